"""A data set in memory: where each image lies, and its boxes with their names; and how annotations become that."""

import hashlib
import math
from array import array
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int64
from numpy import ndarray

LARGEST_SIDE = 2**24  # pixels: up to here float32 holds every one
LONG_NAME = 200  # characters; longer names are kept and counted
FREQUENCIES = ("r", "c", "f", "u")  # rare, common, frequent; unseen in training
Corners = tuple[float, float, float, float]


@dataclass(frozen=True)
class Category:
    id: int
    name: str  # underscores of the json are spaces here
    synonyms: tuple[str, ...] = ()
    frequency: str = ""  # r, c, f, u (unseen in training), or empty where the json does not say


@runtime_checkable
class Pictures(Protocol):
    """Encoded pictures by number, for any number of threads."""

    def __getitem__(self, number: int) -> bytes: ...


class Stored(NamedTuple):
    """Where a picture lies that has no file of its own (data/prepared/read.py)."""

    pictures: Pictures
    number: int


class Ignored(NamedTuple):
    """A box that an evaluation neither looks for nor takes for a mistake, as a crowd region of a json."""

    corners: Corners
    category_id: int


@dataclass(frozen=True, eq=False, slots=True)
class Record:
    image_id: int
    path: Path  # of the image file; of a stored picture what messages call it
    width: int
    height: int
    boxes: Float32[ndarray, "n 4"]  # x0, y0, x1, y1 in pixels, inside the image
    names: tuple[tuple[str, ...], ...]  # one or more per box
    category_ids: Int64[ndarray, "n"]
    stored: Stored | None = None
    ignored: tuple[Ignored, ...] = ()  # of annotations that are not in a json, where the truth has its own


@dataclass(frozen=True, eq=False)
class Dataset:
    annotations: Path  # the json it was read from, or that of a prepared folder; or a label folder with ":split"
    records: tuple[Record, ...]
    categories: tuple[Category, ...]

    def __len__(self) -> int:
        return len(self.records)

    def first(self, limit: int) -> "Dataset":
        """The first `limit` images; 0 = all."""
        return Dataset(self.annotations, self.records[:limit] if limit else self.records, self.categories)

    def names(self) -> tuple[str, ...]:
        """Every name that some box carries, sorted."""
        return tuple(sorted({name for record in self.records for names in record.names for name in names}))


@dataclass
class Problems:
    """What was wrong in annotations and could be passed over: how often each kind occurred, and a few examples."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def of_kinds(self, *beginnings: str) -> "Problems":
        """Those whose kind begins with one of these."""
        kinds = [kind for kind in self.counts if kind.startswith(beginnings)]
        return Problems({k: self.counts[k] for k in kinds}, {k: self.examples[k] for k in kinds})

    def add(self, kind: str, example: str, count: int = 1) -> None:
        self.counts[kind] = self.counts.get(kind, 0) + count
        shown = self.examples.setdefault(kind, [])
        if len(shown) < 3:
            shown.append(example)

    def __str__(self) -> str:
        return "; ".join(f"{n} × {kind} ({', '.join(self.examples[kind])})" for kind, n in self.counts.items())


def clean_text(text: str) -> str:
    """Stripped, and with "?" in the place of half characters, which json can hold and UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode().strip()


class Names:
    """Names as records hold them: clean, without empty ones; equal ones are one object in memory."""

    def __init__(self):
        self._known: dict[tuple[str, ...], tuple[str, ...]] = {}

    def __call__(self, names: Sequence[str], problems: Problems, label: str) -> tuple[str, ...]:
        """Empty, and counted, where there is no name."""
        kept = tuple(clean for name in names if (clean := clean_text(name)))
        if not kept:
            problems.add("empty name", label)
        elif max(map(len, kept)) > LONG_NAME:
            problems.add(f"name of more than {LONG_NAME} characters, kept", f"{label}: {max(kept, key=len)[:40]}…")
        return self._known.setdefault(kept, kept)


class AnnotationReader:
    """What has been read of one picture."""

    __slots__ = ("_categories", "_corners", "_ignored", "height", "names", "path", "width")

    def __init__(self, path: Path, width: int, height: int):
        self.path, self.width, self.height = path, width, height
        self._corners, self._categories = array("f"), array("q")
        self.names: list[tuple[str, ...]] = []
        self._ignored: tuple[tuple[str, Corners, int], ...] = ()

    def add(self, bbox: Any, names: tuple[str, ...], category_id: int, problems: Problems, label: str) -> None:
        """Keeps the box (x, y, width, height in pixels) clipped to the picture, or says in `problems` why not."""
        numbers = _finite(bbox)
        if numbers is None:
            return problems.add("box is not four finite numbers", f"{label}: {bbox!r:.80}")
        x, y, w, h = numbers
        if w <= 0 or h <= 0:
            return problems.add("box without area", f"{label}: {bbox}")
        return self._keep((x, y, x + w, y + h), names, category_id, problems, f"{label}: {bbox}", ignored=False)

    def add_corners(
        self,
        corners: Corners,
        names: tuple[str, ...],
        category_id: int,
        problems: Problems,
        said: str,
        ignored: bool = False,
    ) -> None:
        """`add` for x0, y0, x1, y1 in pixels; `said` is how messages give the box. `ignored`: see `Record`."""
        if not all(map(math.isfinite, corners)):
            return problems.add("box is not four finite numbers", said)
        if corners[2] <= corners[0] or corners[3] <= corners[1]:
            return problems.add("box without area", said)
        return self._keep(corners, names, category_id, problems, said, ignored)

    def _keep(
        self, wanted: Corners, names: tuple[str, ...], category_id: int, problems: Problems, said: str, ignored: bool
    ) -> None:
        x0, y0, x1, y1 = wanted
        clipped = (max(x0, 0.0), max(y0, 0.0), min(x1, float(self.width)), min(y1, float(self.height)))
        if clipped[2] <= clipped[0] or clipped[3] <= clipped[1]:
            return problems.add("box outside its image", f"{said} in {self.width}×{self.height}")
        corners = array("f", clipped)
        if corners[2] <= corners[0] or corners[3] <= corners[1]:  # thinner than float32 can tell
            return problems.add("box without area", said)
        if clipped != wanted:
            problems.add("box clipped to its image", f"{said} in {self.width}×{self.height}")
        if ignored:
            problems.add("difficult object, as a crowd region", said)
            self._ignored += ((names[0], clipped, category_id),)
            return None
        self._corners.extend(corners)
        self.names.append(names)
        self._categories.append(category_id)
        return None

    def every_name(self) -> set[str]:
        """Of its boxes, and of those that are ignored."""
        return {name for names in self.names for name in names}.union(name for name, _, _ in self._ignored)

    def record(self, image_id: int, category_of: Mapping[str, int] | None = None) -> Record:
        """The picture's record. `category_of` replaces each box's category by that of its first name."""
        if category_of is None:
            categories = np.array(self._categories, np.int64)
        else:
            categories = np.array([category_of[names[0]] for names in self.names], np.int64)
        return Record(
            image_id=image_id,
            path=self.path,
            width=self.width,
            height=self.height,
            boxes=np.array(self._corners, np.float32).reshape(-1, 4),
            names=tuple(self.names),
            category_ids=categories,
            ignored=tuple(
                Ignored(corners, category_of[name] if category_of else category_id)
                for name, corners, category_id in self._ignored
            ),
        )


def image_id_of(place: str, taken: Container[int]) -> int:
    """An id for the picture at a place in its folder: the same in every copy of it, whatever is added to it.

    Below 2⁵², which every reader of json can hold; the next that is not `taken`.
    """
    number = int.from_bytes(hashlib.sha256(place.encode("utf-8", "surrogateescape")).digest()[:8]) >> 12
    while number in taken:
        number += 1
    return number


def _finite(bbox: Any) -> Corners | None:
    if not isinstance(bbox, list) or len(bbox) != 4:
        return None
    if any(isinstance(number, bool) or not isinstance(number, int | float) for number in bbox):
        return None
    try:
        x, y, w, h = (float(number) for number in bbox)
    except OverflowError:  # an integer beyond float64
        return None
    return (x, y, w, h) if math.isfinite(x + y + w + h) else None


_WRITTEN = {"": False, "0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}


def flag(entry: Mapping[str, Any], name: str, problems: Problems, where: str) -> bool:
    """0 or 1, false or true, also as text: "0" is false. Anything else is counted, and false."""
    value = entry.get(name)
    if value is None or value in (0, 1):
        return bool(value)
    written = _WRITTEN.get(value.strip().lower()) if isinstance(value, str) else None
    if written is None:
        problems.add(f"{name} is neither 0 nor 1, taken as 0, box kept", f"{where}: {value!r:.40}")
    return bool(written)


def frequency(entry: Mapping[str, Any], problems: Problems, where: str) -> str:
    """The group of a category, or "" where there is none; one that is not of FREQUENCIES is counted."""
    value = entry.get("frequency")
    written = clean_text(value) if isinstance(value, str) else value
    if written is None or written == "":
        return ""
    if written in FREQUENCIES:
        return written
    problems.add("frequency is not r, c, f or u, category kept without", f"{where}: {value!r:.40}")
    return ""


def written_names(value: Any) -> list[str] | None:
    """The names in an annotation's field: comma-separated, a list, or one whole number. None where it is no text.

    Nulls in a list are left out.
    """
    if isinstance(value, str):
        return value.split(",")
    listed = value if isinstance(value, list) else [value]
    if all(part is None or isinstance(part, str) or type(part) is int for part in listed):
        return [str(part) for part in listed if part is not None]
    return None
