"""Batches for training and evaluation.

The training stream is a pure function of (seed, step): plan.py says which images make up a step's batch, and each
example draws from its own generator. grain only reads ahead, with threads, so the stream is the same with any number of
them and goes on exactly where an iterator's state was taken.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import grain
import numpy as np
from absl import logging
from jaxtyping import Bool, Float32, Int32, Int64, UInt8
from numpy import ndarray

from opendet_jax.batch import Batch, Images, Objects
from opendet_jax.config import Config, DataConfig
from opendet_jax.data.buckets import choose, fit
from opendet_jax.data.images import ImageError, read_record
from opendet_jax.data.json_source import AnnotationError, read_json
from opendet_jax.data.plan import PlannedBatch, Slot, example_rng, plan_epoch, steps_per_epoch
from opendet_jax.data.records import Dataset, Record
from opendet_jax.data.scenes import generate
from opendet_jax.data.text_embeddings import TextEmbedder
from opendet_jax.data.tokenizer import Tokenizer, encode_names
from opendet_jax.data.transforms import (
    Geometry,
    evaluation_geometry,
    pad,
    training_geometry,
    transform_boxes,
    transform_pixels,
)

SCENES_SEED = 0
ENDLESS = 2**40  # steps
PLANS_KEPT = 2  # epochs: reading ahead crosses from one into the next


@dataclass(frozen=True, eq=False)  # no pytree, whose inside grain would map over
class TrainingBatch:
    batch: Batch  # of numpy arrays
    image_ids: Int64[ndarray, "B"]


@dataclass(frozen=True, eq=False)
class EvaluationBatch:
    images: Images  # of numpy arrays
    image_ids: Int64[ndarray, "B"]  # −1: a black picture that fills up the last batch of a bucket
    original_sizes: Int32[ndarray, "B 2"]  # height, width of the file
    resized_sizes: Int32[ndarray, "B 2"]  # height, width without the padding


def load_datasets(config: Config, workdir: str | Path) -> tuple[Dataset, Dataset]:
    """The training and the evaluation set, cut to `data.train_limit` and `eval.limit`.

    Scenes are drawn on first use into `data.scenes_dir`, or the workdir. Annotations passed over are reported in one
    warning a file.
    """
    data = config.data
    if data.source == "scenes":
        folder = Path(data.scenes_dir or workdir)
        train = generate(folder, data.scenes_train, SCENES_SEED, data.scenes_size, "train")
        val = generate(folder, data.scenes_eval, SCENES_SEED, data.scenes_size, "val", frequencies_from=train)
        sources = [(path, path.parent / "images") for path in (train, val)]
    else:
        sources = [(paths.annotations, paths.images) for paths in (data.train, data.eval)]
    datasets = [_read(annotations, images) for annotations, images in sources]
    return datasets[0].first(data.train_limit), datasets[1].first(config.eval.limit)


def _read(annotations: str | Path, images: str | Path) -> Dataset:
    dataset, problems = read_json(annotations, images)
    if problems.counts:
        logging.warning("%s: %s", annotations, problems)
    return dataset


def training_stream(
    dataset: Dataset, config: DataConfig, tokenizer: Tokenizer, embedder: TextEmbedder, seed: int
) -> grain.IterDataset[TrainingBatch]:
    """An endless stream of `TrainingBatch`. Its iterators have get_state() and set_state(); a state holds the step.

    Every name is embedded and tokenised here, so that a name the embedder does not know is an error at once.
    """
    return _read_ahead(TrainingSource(dataset, config, tokenizer, embedder, seed), config)


def _read_ahead(source, config: DataConfig) -> grain.IterDataset:
    options = grain.ReadOptions(num_threads=config.threads, prefetch_buffer_size=max(config.prefetch, config.threads))
    return grain.MapDataset.source(source).to_iter_dataset(options)


class _Example(NamedTuple):
    pixels: UInt8[ndarray, "H W 3"]
    mask: Bool[ndarray, "H W"]
    boxes: Float32[ndarray, "m 4"]
    names: tuple[str, ...]
    image_id: int


class TrainingSource:
    """Random access by step. Unreadable images are replaced by the next record, and each is logged once."""

    def __init__(self, dataset: Dataset, config: DataConfig, tokenizer: Tokenizer, embedder: TextEmbedder, seed: int):
        self._records = tuple(record for record in dataset.records if len(record.boxes))
        if not self._records:
            raise AnnotationError(f"{dataset.annotations}: no image has an object to train on")
        crowded = sum(len(record.boxes) > config.max_objects for record in self._records)
        if crowded:
            logging.warning(
                "%s: %d images have more than data.max_objects = %d objects; a random %d of each are used at a time",
                *(dataset.annotations, crowded, config.max_objects, config.max_objects),
            )
        names = dataset.names()
        self._row_of = {name: row for row, name in enumerate(names)}
        self._texts = embedder.embed(names)
        self._tokens = encode_names(tokenizer, names, config.max_name_tokens)
        self._config, self._seed = config, seed
        self._plans: dict[int, tuple[PlannedBatch, ...]] = {}
        self._lock = Lock()
        self.unreadable: set[Path] = set()

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, step: int) -> TrainingBatch:
        epoch, number = divmod(step, steps_per_epoch(len(self._records), self._config.batch_size))
        planned = self._plan(epoch)[number]
        examples = [self._example(epoch, slot, self._config.buckets[planned.bucket]) for slot in planned.slots]
        images = Images(np.stack([e.pixels for e in examples]), np.stack([e.mask for e in examples]))
        return TrainingBatch(Batch(images, self._objects(examples)), np.array([e.image_id for e in examples]))

    def _plan(self, epoch: int) -> tuple[PlannedBatch, ...]:
        with self._lock:
            if epoch not in self._plans:
                if len(self._plans) == PLANS_KEPT:
                    del self._plans[min(self._plans)]
                self._plans[epoch] = plan_epoch(self._records, self._config, self._seed, epoch)
            return self._plans[epoch]

    def _example(self, epoch: int, slot: Slot, bucket: tuple[int, int]) -> _Example:
        for attempt in range(len(self._records)):
            record = self._records[(slot.record + attempt) % len(self._records)]
            rng = example_rng(self._seed, epoch, slot.position, attempt)
            geometry = training_geometry(rng, record, self._config)
            try:
                pixels = read_record(record)
            except ImageError as error:
                self._report(record.path, error)
                continue
            return _finish(rng, record, pixels, geometry, bucket, self._config.max_objects)
        raise ImageError(
            f"none of the {len(self._records)} training images can be read, the first: {self._records[0].path}"
        )

    def _report(self, path: Path, error: ImageError) -> None:
        with self._lock:
            if path not in self.unreadable:
                self.unreadable.add(path)
                logging.warning("skipped in training (unreadable image %d): %s", len(self.unreadable), error)

    def _objects(self, examples: list[_Example]) -> Objects:
        shape = (len(examples), self._config.max_objects)
        boxes, valid = np.zeros((*shape, 4), np.float32), np.zeros(shape, np.bool_)
        texts = np.zeros((*shape, self._texts.shape[1]), np.float32)
        tokens = np.zeros((*shape, self._tokens.shape[1]), np.int32)
        for i, example in enumerate(examples):
            rows, count = [self._row_of[name] for name in example.names], len(example.names)
            boxes[i, :count], valid[i, :count] = example.boxes, True
            texts[i, :count], tokens[i, :count] = self._texts[rows], self._tokens[rows]
        return Objects(boxes, valid, texts, tokens)


def _finish(
    rng: np.random.Generator,
    record: Record,
    pixels: UInt8[ndarray, "h w 3"],
    geometry: Geometry,
    bucket: tuple[int, int],
    max_objects: int,
) -> _Example:
    """Carry out the geometry, in a size that fits the bucket; keep at most `max_objects` and one name of each."""
    fitted = Geometry(geometry.window, fit(geometry.size, bucket), geometry.flip)
    boxes, kept = transform_boxes(record.boxes, fitted)
    indices = np.flatnonzero(kept)
    if len(indices) > max_objects:
        chosen = np.sort(rng.choice(len(indices), max_objects, replace=False))
        boxes, indices = boxes[chosen], indices[chosen]
    names = tuple(record.names[i][rng.integers(len(record.names[i]))] for i in indices)
    padded, mask = pad(transform_pixels(pixels, fitted), bucket)
    return _Example(padded, mask, boxes, names, record.image_id)


class EvaluationSource:
    """Random access by batch: buckets in the config's order, in each the images in the data set's order."""

    def __init__(self, dataset: Dataset, config: DataConfig, batch_size: int):
        groups: dict[int, list[tuple[Record, Geometry]]] = defaultdict(list)
        for record in dataset.records:
            geometry = evaluation_geometry(record.height, record.width, config)
            bucket = choose(geometry.size, config.buckets)
            fitted = Geometry(geometry.window, fit(geometry.size, config.buckets[bucket]))
            groups[bucket].append((record, fitted))
        self._batch_size = batch_size
        self._batches = [
            (config.buckets[bucket], members[i : i + batch_size])
            for bucket, members in sorted(groups.items())
            for i in range(0, len(members), batch_size)
        ]

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, number: int) -> EvaluationBatch:
        bucket, members = self._batches[number]
        size = self._batch_size
        # A filler counts as a whole black picture, which every part of the model can deal with.
        pixels, mask = np.zeros((size, *bucket, 3), np.uint8), np.ones((size, *bucket), np.bool_)
        image_ids = np.full(size, -1, np.int64)
        original, resized = np.full((2, size, 2), bucket, np.int32)
        for i, (record, geometry) in enumerate(members):
            pixels[i], mask[i] = pad(transform_pixels(read_record(record), geometry), bucket)
            image_ids[i], original[i], resized[i] = record.image_id, (record.height, record.width), geometry.size
        return EvaluationBatch(Images(pixels, mask), image_ids, original, resized)


class EvaluationBatches:
    """Iterable any number of times, read ahead with threads; its length is the number of batches."""

    def __init__(self, source: EvaluationSource, config: DataConfig):
        self._length = len(source)
        self._stream = _read_ahead(source, config) if self._length else ()

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[EvaluationBatch]:
        return iter(self._stream)


def evaluation_batches(dataset: Dataset, config: DataConfig, batch_size: int) -> EvaluationBatches:
    """Every image once, in a fixed order that groups buckets. An image that cannot be read raises ImageError."""
    return EvaluationBatches(EvaluationSource(dataset, config, batch_size), config)
