"""From generated names to classes of the data set (method section 13). Every result says which mapping it used.

Here: what every mapping is, and the mapping "exact". The paper's, by a text encoder, is in text_mapping.py.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int64
from numpy import ndarray

UNMAPPED = -1  # the id of a name that is no class


@dataclass(frozen=True)
class Classes:
    """The k classes of each of n boxes, the best first."""

    ids: Int64[ndarray, "n k"]
    scores: Float32[ndarray, "n k"]  # of (box, class) as a detection


@runtime_checkable
class NameMapping(Protocol):
    title: str

    def __call__(self, names: Sequence[Sequence[str]], scores: Float32[ndarray, " n"]) -> Classes:
        """Classes of the boxes of an image: each has `names`, from best to worst beam, and a score p."""
        ...


def normalise(name: str) -> str:
    """Lower case, underscores as spaces, no space more than needed: "Bus_(vehicle) " → "bus (vehicle)"."""
    return " ".join(name.replace("_", " ").lower().split())


class ExactMapping:
    """The mapping "exact": a box is of the class whose name or synonym its best name equals, with score p.

    Where a synonym of one class is the name of another, the name wins; of equal synonyms, the smaller id does. A name
    that is no class has the id UNMAPPED.
    """

    title = "exact"

    def __init__(self, categories: Iterable[Mapping[str, Any]]):
        """`categories` have "id", "name" and, where known, "synonyms", as in LVIS's files."""
        ordered = sorted(categories, key=lambda category: category["id"])
        self._class: dict[str, int] = {}
        for category in ordered:
            self._class.setdefault(normalise(category["name"]), category["id"])
        for category in ordered:
            for synonym in category.get("synonyms", ()):
                self._class.setdefault(normalise(synonym), category["id"])

    def class_of(self, name: str) -> int:
        """The class's id, or UNMAPPED."""
        return self._class.get(normalise(name), UNMAPPED)

    def __call__(self, names: Sequence[Sequence[str]], scores: Float32[ndarray, " n"]) -> Classes:
        ids = np.array([self.class_of(beams[0]) for beams in names], np.int64)
        return Classes(ids[:, None], scores[:, None])
