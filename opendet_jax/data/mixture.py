"""What training draws from: one data set, or several, each with a weight."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from opendet_jax.data.json_stream import AnnotationError
from opendet_jax.data.records import Dataset, Record


@dataclass(frozen=True, eq=False)
class Part:
    """The images of one json that have objects, and how often an epoch shows each.

    With weight 3 every image comes three times an epoch, with weight 0.5 a random half of them once, with 1.5 all of
    them and a random half again.
    """

    annotations: Path  # the json they are of
    records: tuple[Record, ...]
    weight: float = 1.0

    @property
    def shows(self) -> int:
        """Images of this part an epoch, repeated ones counted; at least one."""
        return max(1, round(self.weight * len(self.records)))


@dataclass(frozen=True, eq=False)
class Mixture:
    """Images of all parts in a row. Only their names matter in training: ids of different jsons never meet."""

    parts: tuple[Part, ...]

    @classmethod
    def of(cls, *weighted: tuple[Dataset, float]) -> "Mixture":
        """Of data sets and their weights. Raises AnnotationError where one has no image with an object."""
        parts = []
        for dataset, weight in weighted:
            records = tuple(record for record in dataset.records if len(record.boxes))
            if not records:
                raise AnnotationError(f"{dataset.annotations}: no image has an object to train on")
            parts.append(Part(dataset.annotations, records, weight))
        return cls(tuple(parts))

    @cached_property
    def records(self) -> tuple[Record, ...]:
        return tuple(record for part in self.parts for record in part.records)

    @property
    def shows(self) -> int:
        """Images an epoch."""
        return sum(part.shows for part in self.parts)

    def names(self) -> tuple[str, ...]:
        """Every name that some box carries, sorted."""
        return tuple(sorted({name for record in self.records for names in record.names for name in names}))

    def describe(self) -> str:
        """What an epoch holds, to print."""
        if len(self.parts) == 1 and self.parts[0].weight == 1:
            return f"{self.shows} training images"
        lines = [f"{self.shows} training images an epoch:"]
        for part in self.parts:
            share = f"{part.shows / self.shows:.1%}"
            lines.append(f"  {share:>6} {part.annotations}: {len(part.records)} images × {part.weight:g}")
        return "\n".join(lines)
