"""A data set in memory: where each image lies, and its boxes with their names."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

from jaxtyping import Float32, Int64
from numpy import ndarray


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


@dataclass(frozen=True, eq=False)
class Dataset:
    annotations: Path  # the json it was read from, or that of a prepared folder
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

    def add(self, kind: str, example: str, count: int = 1) -> None:
        self.counts[kind] = self.counts.get(kind, 0) + count
        shown = self.examples.setdefault(kind, [])
        if len(shown) < 3:
            shown.append(example)

    def __str__(self) -> str:
        return "; ".join(f"{n} × {kind} ({', '.join(self.examples[kind])})" for kind, n in self.counts.items())
