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
NAMES_SAID = 10
# The classes that a name may stand for: those of the first group of which any has an object, or else of the first.
Bearers = tuple[tuple[int, ...], ...]
Encode = Callable[[Sequence[str]], Float32[ndarray, "n E"]]  # texts to unit rows


@dataclass(frozen=True)
class Classes:
    """The k classes of each of n boxes, the best first."""

    ids: Int64[ndarray, "n k"]  # of a name that several classes bear, the first of these: `settle` chooses
    scores: Float32[ndarray, "n k"]  # of (box, class) as a detection
    shared: Int64[ndarray, "n k"] | None = None  # the place of that name in `bearers`, −1: one class alone bears it
    bearers: Sequence[Bearers] = ()


@runtime_checkable
class NameMapping(Protocol):
    title: str

    def __call__(self, names: Sequence[Sequence[str]], scores: Float32[ndarray, " n"]) -> Classes:
        """Classes of the boxes of an image: each has `names`, from best to worst beam, and a score p."""
        ...


def normalise_name(name: str) -> str:
    """Lower case, underscores as spaces, no space more than needed: "Bus_(vehicle) " → "bus (vehicle)"."""
    return " ".join(name.replace("_", " ").lower().split())


def shared_names(categories: Iterable[Mapping[str, Any]]) -> dict[str, tuple[int, ...]]:
    """The names that several classes bear, after `normalise_name`, and the classes' ids, rising."""
    return {name: ids for name, ids in _by_name(categories).items() if len(ids) > 1}


def shared_said(shared: Mapping[str, tuple[int, ...]]) -> str:
    """What `shared_names` gives, for a message: the first ten."""
    listed = ", ".join(f"{name!r} ({', '.join(map(str, ids))})" for name, ids in [*shared.items()][:NAMES_SAID])
    return f"names that several classes bear ({len(shared)}): {listed}{', …' if len(shared) > NAMES_SAID else ''}"


def _by_name(categories: Iterable[Mapping[str, Any]]) -> dict[str, tuple[int, ...]]:
    """The ids of the classes of each name, both in the order of ids. A class without a name is left out."""
    ids: dict[str, tuple[int, ...]] = {}
    for category in sorted(categories, key=lambda category: category["id"]):
        name = normalise_name(category["name"])
        if name:
            ids[name] = (*ids.get(name, ()), category["id"])
    return ids


class ExactMapping:
    """The mapping "exact": a box is of the class whose name or synonym its best name equals, with score p.

    Where a synonym of one class is the name of another that has an object, the name wins. Of several classes of one
    name, or with one synonym, the objects decide (evaluator.py); where nothing is known of these, the smallest id
    does. A name that is no class has the id UNMAPPED.
    """

    title = "exact"

    def __init__(self, categories: Iterable[Mapping[str, Any]]):
        """`categories` have "id", "name" and, where known, "synonyms", as in LVIS's files."""
        ordered = sorted(categories, key=lambda category: category["id"])
        named = _by_name(ordered)
        synonymous: dict[str, tuple[int, ...]] = {}
        for category in ordered:
            for synonym in sorted({normalise_name(synonym) for synonym in category.get("synonyms", ())}):
                if synonym and category["id"] not in named.get(synonym, ()):
                    synonymous[synonym] = (*synonymous.get(synonym, ()), category["id"])
        self._class: dict[str, int] = {}
        self._shared: dict[str, int] = {}  # of a name that several bear, its place in `bearers`
        self._bearers: list[Bearers] = []
        for name in named | synonymous:
            own, others = named.get(name, ()), synonymous.get(name, ())
            ids = [*own, *others]
            self._class[name] = ids[0]
            if len(ids) > 1:
                self._shared[name] = len(self._bearers)
                self._bearers.append(tuple(group for group in (own, others) if group))

    def class_of(self, name: str) -> int:
        """The class's id, or UNMAPPED."""
        return self._class.get(normalise_name(name), UNMAPPED)

    def __call__(self, names: Sequence[Sequence[str]], scores: Float32[ndarray, " n"]) -> Classes:
        best = [normalise_name(beams[0]) for beams in names]
        ids = np.array([self._class.get(name, UNMAPPED) for name in best], np.int64)[:, None]
        if not self._shared:
            return Classes(ids, scores[:, None])
        shared = np.array([self._shared.get(name, -1) for name in best], np.int64)[:, None]
        return Classes(ids, scores[:, None], shared, self._bearers)


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
    """The mapping "text_encoder" onto the names of a data set's classes; of equally similar ones the smaller id goes
    first. Classes of one name take one of the 15 places, and their objects decide (evaluator.py).
    """

    title = "text_encoder"

    def __init__(self, categories: Iterable[Mapping[str, Any]], encode: Encode):
        """`categories` have "id" and "name", as in LVIS's files."""
        categories = list(categories)
        written = {category["id"]: category["name"] for category in categories}
        groups = list(_by_name(categories).values())
        self._ids = np.array([ids[0] for ids in groups], np.int64)
        self._rows = encode([class_text(written[ids[0]]) for ids in groups])
        self._bearers: list[Bearers] = [(ids,) for ids in groups if len(ids) > 1]
        several = np.array([len(ids) > 1 for ids in groups], np.bool_)
        self._shared = np.where(several, np.cumsum(several) - 1, -1)
        self._encode = encode

    def __call__(self, names: Sequence[Sequence[str]], scores: Float32[ndarray, " n"]) -> Classes:
        places, class_scores = most_similar_classes(names, scores, self._rows, self._encode)
        shared = self._shared[places] if self._bearers else None
        return Classes(self._ids[places], class_scores, shared, self._bearers)
