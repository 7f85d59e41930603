"""Training examples by step: augmented pictures in their batch, their boxes and the names drawn for them.

Images that cannot be read are skipped and counted; too many of them end training.

Method: docs/method.md#1-image.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import numpy as np
from absl import logging
from jaxtyping import Bool, Float32, Int32, Int64, UInt8
from numpy import ndarray

from opendet_jax.config import DataConfig
from opendet_jax.data.formats.records import Record
from opendet_jax.data.images import ImageError, open_record
from opendet_jax.data.plan import Mixture, PlannedBatch, Slot, example_rng, plan_epoch, steps_per_epoch
from opendet_jax.data.transforms import Geometry, Size, fit, place, resample, training_geometry, transform_boxes

ESTIMATE = 1000  # images: earlier, the share is taken of this many
NAMED = 5  # files that the error names
PLANS_KEPT = 2  # epochs: reading ahead crosses from one into the next


class Unreadable:
    """Counts different images, of one process. Safe to use from several threads.

    Training ends when more than `limit` of the images seen so far cannot be read. Until 1,000 (or all) have been seen,
    the share is of so many, so that a bad start is no reason to stop; a single bad image never is, unless the limit
    is 0.
    """

    def __init__(self, limit: float, total: int):
        self._limit, self._total = limit, total
        self._seen: set[int] = set()
        self._paths: dict[int, Path] = {}
        self._lock = Lock()

    def saw(self, record: int, path: Path, error: ImageError | None = None) -> None:
        """Notes that an image was read, or why not (logged once an image). Raises ImageError for one too many."""
        with self._lock:
            self._seen.add(record)
            if error is None or record in self._paths:
                return
            self._paths[record] = path
            bad, seen = len(self._paths), len(self._seen)
            logging.warning("skipped in training (unreadable image %d of %d seen): %s", bad, seen, error)
            counted = max(seen, min(ESTIMATE, self._total))
            few = bad == 1 and self._limit > 0
            if bad == self._total or (bad > self._limit * counted and not few):
                named = ", ".join(str(path) for path in list(self._paths.values())[:NAMED])
                raise ImageError(
                    f"{bad} of the {seen} training images seen so far ({self._total} in all) cannot be read, "
                    f"data.max_unreadable is {self._limit:g}: {named}{', …' if bad > NAMED else ''}"
                )


@dataclass(frozen=True, eq=False)
class ExampleBatch:
    """A process's share of a step's images. Boxes are (cx, cy, w, h) in [0, 1] of the unpadded picture."""

    pixels: UInt8[ndarray, "B H W 3"]  # RGB
    mask: Bool[ndarray, "B H W"]  # True on the photograph
    boxes: Float32[ndarray, "B G 4"]
    valid: Bool[ndarray, "B G"]
    names: tuple[tuple[str, ...], ...]  # of the valid boxes of each image
    image_ids: Int64[ndarray, "B"]
    rows: Int32[ndarray, "B"]  # their places in the batch of all processes
    paths: tuple[Path, ...]


class Examples:
    """Random access by step: a pure function of (seed, step), whatever was asked for before.

    Of several processes each makes the rows of the batch that lie on its devices (None: all); put together they are the
    batch of one process. An unreadable image is replaced by the next record that can be read, and counted.
    """

    def __init__(self, mixture: Mixture, config: DataConfig, seed: int, rows: Sequence[int] | None = None):
        _warn_of_crowds(mixture, config.max_objects)
        self._rows = np.array(range(config.batch_size) if rows is None else rows, np.int32)
        self._mixture, self._config, self._seed = mixture, config, seed
        self._steps_per_epoch = steps_per_epoch(mixture.shows, config.batch_size)
        self._unreadable = Unreadable(config.max_unreadable, len(mixture.records))
        self._plans: dict[int, tuple[PlannedBatch, ...]] = {}
        self._lock = Lock()

    def __getitem__(self, step: int) -> ExampleBatch:
        epoch, number = divmod(step, self._steps_per_epoch)
        planned = self._plan(epoch)[number]
        slots, bucket = [planned.slots[row] for row in self._rows], self._config.buckets[planned.bucket]
        size, most = len(slots), self._config.max_objects
        pixels, mask = np.zeros((size, *bucket, 3), np.uint8), np.zeros((size, *bucket), np.bool_)
        boxes, valid = np.zeros((size, most, 4), np.float32), np.zeros((size, most), np.bool_)
        records, names = [], []
        for i, slot in enumerate(slots):
            record, drawn, drawn_names = self._example(epoch, slot, bucket, pixels[i], mask[i])
            boxes[i, : len(drawn)], valid[i, : len(drawn)] = drawn, True
            records.append(record)
            names.append(drawn_names)
        ids = np.array([record.image_id for record in records], np.int64)
        paths = tuple(record.path for record in records)
        return ExampleBatch(pixels, mask, boxes, valid, tuple(names), ids, self._rows, paths)

    def _plan(self, epoch: int) -> tuple[PlannedBatch, ...]:
        with self._lock:
            if epoch not in self._plans:
                if len(self._plans) == PLANS_KEPT:
                    del self._plans[min(self._plans)]
                self._plans[epoch] = plan_epoch(self._mixture, self._config, self._seed, epoch)
            return self._plans[epoch]

    def _example(
        self, epoch: int, slot: Slot, bucket: Size, pixels: UInt8[ndarray, "H W 3"], mask: Bool[ndarray, "H W"]
    ) -> tuple[Record, Float32[ndarray, "m 4"], tuple[str, ...]]:
        """Puts the slot's picture into its place of the batch; which record it is, its boxes and a name of each."""
        records = self._mixture.records
        for attempt in range(len(records)):
            number = (slot.record + attempt) % len(records)
            record = records[number]
            rng = example_rng(self._seed, epoch, slot.position, attempt)
            drawn = training_geometry(rng, record, self._config)
            try:
                image = open_record(record, self._config.max_pixels)
            except ImageError as error:
                self._unreadable.saw(number, record.path, error)
                continue
            self._unreadable.saw(number, record.path)
            geometry = Geometry(drawn.window, fit(drawn.size, bucket), drawn.flip)
            place(resample(image, geometry), pixels, mask)
            return record, *_objects(rng, record, geometry, self._config.max_objects)
        raise AssertionError("Unreadable ends training when no image can be read")


def _objects(
    rng: np.random.Generator, record: Record, geometry: Geometry, most: int
) -> tuple[Float32[ndarray, "m 4"], tuple[str, ...]]:
    """The boxes that the geometry keeps, `most` of them at most, and one name of each."""
    boxes, kept = transform_boxes(record.boxes, geometry)
    indices = np.flatnonzero(kept)
    if len(indices) > most:
        chosen = np.sort(rng.choice(len(indices), most, replace=False))
        boxes, indices = boxes[chosen], indices[chosen]
    return boxes, tuple(record.names[i][rng.integers(len(record.names[i]))] for i in indices)


def _warn_of_crowds(mixture: Mixture, most: int) -> None:
    for part in mixture.parts:
        crowded = sum(len(record.boxes) > most for record in part.records)
        if crowded:
            logging.warning(
                "%s: %d images have more than data.max_objects = %d objects; a random %d of each are used at a time",
                *(part.annotations, crowded, most, most),
            )
