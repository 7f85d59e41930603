"""The plan of an epoch: which images make up each batch, as a pure function of (seed, epoch)."""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from opendet_jax.config import DataConfig
from opendet_jax.data.buckets import choose
from opendet_jax.data.records import Record
from opendet_jax.data.transforms import training_geometry


class Slot(NamedTuple):
    """One place in a training batch."""

    position: int  # in the epoch: seeds the example's randomness
    record: int


class PlannedBatch(NamedTuple):
    bucket: int
    slots: tuple[Slot, ...]


def steps_per_epoch(images: int, batch_size: int) -> int:
    """Of `images` images that have objects: a constant, so that a step's epoch is known without planning others."""
    return max(1, images // batch_size)


def example_rng(seed: int, epoch: int, position: int, attempt: int = 0) -> np.random.Generator:
    """The randomness of one example; `attempt` counts the images tried before it that could not be read."""
    return np.random.default_rng([seed, epoch, 1 + position, attempt])  # 0 in third place: the plan's own


def plan_epoch(records: Sequence[Record], config: DataConfig, seed: int, epoch: int) -> tuple[PlannedBatch, ...]:
    """The batches of an epoch: every image once, shuffled, those of one bucket together so that padding stays small.

    The bucket is that of the augmented picture. What is left of the groups forms mixed batches in the largest of
    their buckets; less than a batch of them is left out of this epoch. Where there are fewer images than a batch has
    places, they occur more than once, each time augmented differently.
    """
    size = config.batch_size
    rng = np.random.default_rng([seed, epoch])
    repeats = max(1, -(-size // len(records)))
    order = np.concatenate([rng.permutation(len(records)) for _ in range(repeats)]).tolist()
    groups: dict[int, list[Slot]] = defaultdict(list)
    for position, record in enumerate(order):
        geometry = training_geometry(example_rng(seed, epoch, position), records[record], config)
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
