"""What training draws from, one data set or several, each with a weight; and the plan of an epoch: which images make up
each batch, as a pure function of (seed, epoch).

Method: docs/method.md#1-image.
"""

import math
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64
from numpy import ndarray

from opendet_jax.config import DataConfig
from opendet_jax.data.formats.json_stream import AnnotationError
from opendet_jax.data.formats.records import Dataset, Record
from opendet_jax.data.transforms import choose, training_geometry


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


class Slot(NamedTuple):
    """One place in a training batch."""

    position: int  # in the epoch: seeds the example's randomness
    record: int  # of the mixture


class PlannedBatch(NamedTuple):
    bucket: int
    slots: tuple[Slot, ...]


def steps_per_epoch(shows: int, batch_size: int) -> int:
    """Of `shows` images an epoch: a constant, so that a step's epoch is known without planning others."""
    return max(1, shows // batch_size)


def example_rng(seed: int, epoch: int, position: int, attempt: int = 0) -> np.random.Generator:
    """The randomness of one example; `attempt` counts the images tried before it that could not be read."""
    return np.random.default_rng([seed, epoch, 1 + position, attempt])  # 0 in third place: the plan's own


def plan_epoch(mixture: Mixture, config: DataConfig, seed: int, epoch: int) -> tuple[PlannedBatch, ...]:
    """The batches of an epoch: every image as often as its weight says, shuffled, those of one bucket together so that
    padding stays small.

    The bucket is that of the augmented picture. What is left of the groups forms mixed batches in the largest of
    their buckets; less than a batch of them is left out of this epoch. Where an epoch has fewer images than a batch
    has places, they occur more than once, each time augmented differently.
    """
    size = config.batch_size
    rng = np.random.default_rng([seed, epoch])
    repeats = max(1, -(-size // mixture.shows))
    order = np.concatenate([_order(mixture, rng) for _ in range(repeats)]).tolist()
    groups: dict[int, list[Slot]] = defaultdict(list)
    for position, record in enumerate(order):
        geometry = training_geometry(example_rng(seed, epoch, position), mixture.records[record], config)
        groups[choose(geometry.size, config.buckets)].append(Slot(position, record))
    batches: list[PlannedBatch] = []
    left: list[tuple[int, Slot]] = []
    for bucket, slots in sorted(groups.items()):
        whole = len(slots) - len(slots) % size
        batches += [PlannedBatch(bucket, tuple(slots[i : i + size])) for i in range(0, whole, size)]
        left += [(bucket, slot) for slot in slots[whole:]]
    for i in range(0, len(left) - len(left) % size, size):
        members = left[i : i + size]
        largest = max((bucket for bucket, _ in members), key=lambda bucket: math.prod(config.buckets[bucket]))
        batches.append(PlannedBatch(largest, tuple(slot for _, slot in members)))
    return tuple(batches[i] for i in rng.permutation(len(batches)))


def _order(mixture: Mixture, rng: np.random.Generator) -> Int64[ndarray, "shows"]:
    """The records that an epoch shows, shuffled: whole permutations of each part, and the beginning of one more."""
    chosen, start = [], 0
    for part in mixture.parts:
        count = len(part.records)
        permutations = [rng.permutation(count) for _ in range(-(-part.shows // count))]
        chosen.append(start + np.concatenate(permutations)[: part.shows])
        start += count
    return rng.permutation(np.concatenate(chosen))
