"""From generated names to classes of the data set. Every result says which mapping it used.

"exact": the best name is a class's name or synonym. "text_encoder", the paper's: a box is of the classes whose names
its own name is most similar to, as a text encoder (CLIP's text tower) sees them. Which boxes those are
is chosen in inference.py: all queries, and NMS where they are more than 300.

Method: docs/method.md#13-evaluation.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int64
from numpy import ndarray

UNMAPPED = -1  # the id of a name that is no class
LONGEST = 75  # characters of a generated name that are embedded
KEPT = 15  # classes of a box
Encode = Callable[[Sequence[str]], Float32[ndarray, "n E"]]  # texts to unit rows


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


def normalise_name(name: str) -> str:
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
            self._class.setdefault(normalise_name(category["name"]), category["id"])
        for category in ordered:
            for synonym in category.get("synonyms", ()):
                self._class.setdefault(normalise_name(synonym), category["id"])

    def class_of(self, name: str) -> int:
        """The class's id, or UNMAPPED."""
        return self._class.get(normalise_name(name), UNMAPPED)

    def __call__(self, names: Sequence[Sequence[str]], scores: Float32[ndarray, " n"]) -> Classes:
        ids = np.array([self.class_of(beams[0]) for beams in names], np.int64)
        return Classes(ids[:, None], scores[:, None])


def generated_text(beams: Sequence[str]) -> str:
    """What is embedded of a box: all its names, from best to worst beam, as one; cut, then with its article."""
    return f"a {', '.join(beams)[:LONGEST]}"


def class_text(name: str) -> str:
    """What is embedded of a class. Underscores are spaces, as everywhere else."""
    return f"a {name.replace('_', ' ')}"


def most_similar_classes(
    names: Sequence[Sequence[str]],
    scores: Float32[ndarray, " n"],
    classes: Float32[ndarray, "C E"],
    encode: Encode,
) -> tuple[Int64[ndarray, "n k"], Float32[ndarray, "n k"]]:
    """The k = min(15, C) most similar classes of each box, best first, as places in `classes`; and their scores.

    score = sqrt(p·similarity); similarity = cos(text of the box, text of the class), clamped to [0, 1]. Of equally
    similar classes the first goes first. `names`: of each box, from best to worst beam; `scores`: p of each box;
    `classes`: unit embeddings of the classes' texts. A text that several boxes share is encoded once.
    """
    texts = [generated_text(beams) for beams in names]
    row_of = {text: row for row, text in enumerate(dict.fromkeys(texts))}
    similarity = np.clip(encode(list(row_of)) @ classes.T, 0.0, 1.0)
    places = np.argsort(-similarity, axis=1, kind="stable")[:, :KEPT]
    similarity = np.take_along_axis(similarity, places, axis=1)
    rows = np.array([row_of[text] for text in texts], np.int64)
    return places[rows], np.sqrt(scores[:, None] * similarity[rows])


class TextEncoderMapping:
    """The mapping "text_encoder" onto the classes of a data set; of equally similar ones the smaller id goes first."""

    title = "text_encoder"

    def __init__(self, categories: Iterable[Mapping[str, Any]], encode: Encode):
        """`categories` have "id" and "name", as in LVIS's files."""
        ordered = sorted(categories, key=lambda category: category["id"])
        self._ids = np.array([category["id"] for category in ordered], np.int64)
        self._rows = encode([class_text(category["name"]) for category in ordered])
        self._encode = encode

    def __call__(self, names: Sequence[Sequence[str]], scores: Float32[ndarray, " n"]) -> Classes:
        places, class_scores = most_similar_classes(names, scores, self._rows, self._encode)
        return Classes(self._ids[places], class_scores)
