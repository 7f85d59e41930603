"""Batches for training and evaluation.

The training stream is a pure function of (seed, step): plan.py says which images make up a step's batch, examples.py
makes them, each from its own generator. grain only reads ahead, with threads, so the stream is the same with any number
of them and goes on exactly where an iterator's state was taken.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import grain
import numpy as np
from jaxtyping import Int32, Int64
from numpy import ndarray

from opendet_jax.batch import Batch, Images, Objects
from opendet_jax.config import DataConfig
from opendet_jax.data.examples import ExampleBatch, Examples
from opendet_jax.data.formats.records import Dataset, Record
from opendet_jax.data.images import open_record
from opendet_jax.data.plan import Mixture
from opendet_jax.data.text_embeddings import TextEmbedder
from opendet_jax.data.tokenizer import Tokenizer, encode_names
from opendet_jax.data.transforms import Geometry, choose, evaluation_geometry, fit, place, resample

ENDLESS = 2**40  # steps


@dataclass(frozen=True, eq=False)  # no pytree, whose inside grain would map over
class TrainingBatch:
    batch: Batch  # of numpy arrays
    image_ids: Int64[ndarray, "B"]
    rows: Int32[ndarray, "B"]  # their places in the batch of all processes


@dataclass(frozen=True, eq=False)
class EvaluationBatch:
    images: Images  # of numpy arrays
    image_ids: Int64[ndarray, "B"]
    original_sizes: Int32[ndarray, "B 2"]  # height, width of the file
    resized_sizes: Int32[ndarray, "B 2"]  # height, width without the padding
    real: int  # pictures of the data set; behind them black ones, with id −1, fill up the last batch of a bucket


def training_stream(
    mixture: Mixture,
    config: DataConfig,
    tokenizer: Tokenizer,
    embedder: TextEmbedder,
    seed: int,
    rows: Sequence[int] | None = None,
) -> grain.IterDataset[TrainingBatch]:
    """An endless stream of batches, or of the `rows` that this process has of each.

    Its iterators have get_state() and set_state(); a state holds the step, and fits any number of processes. Every name
    is looked up and tokenised here, so that a name the embedder does not know is an error at once.
    """
    examples = Examples(mixture, config, seed, rows)
    return _read_ahead(TrainingSource(examples, mixture.names(), config, tokenizer, embedder), config)


def _read_ahead(source, config: DataConfig) -> grain.IterDataset:
    options = grain.ReadOptions(num_threads=config.threads, prefetch_buffer_size=max(config.prefetch, config.threads))
    return grain.MapDataset.source(source).to_iter_dataset(options)


class TrainingSource:
    """Random access by step: examples, with embeddings and tokens in the place of their names."""

    def __init__(
        self,
        examples: Examples,
        names: tuple[str, ...],
        config: DataConfig,
        tokenizer: Tokenizer,
        embedder: TextEmbedder,
    ):
        self._examples = examples
        self._place_of = {name: place for place, name in enumerate(names)}
        self._texts = embedder.rows(names)
        self._tokens = encode_names(tokenizer, names, config.max_name_tokens)
        self._text_width = embedder.width

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, step: int) -> TrainingBatch:
        examples = self._examples[step]
        batch = Batch(Images(examples.pixels, examples.mask), self._objects(examples))
        return TrainingBatch(batch, examples.image_ids, examples.rows)

    def _objects(self, examples: ExampleBatch) -> Objects:
        shape = examples.valid.shape
        texts = np.zeros((*shape, self._text_width), np.float32)
        tokens = np.zeros((*shape, self._tokens.shape[1]), np.int32)
        places = np.array([self._place_of[name] for names in examples.names for name in names], np.int64)
        texts[examples.valid], tokens[examples.valid] = self._texts[places], self._tokens[places]
        return Objects(examples.boxes, examples.valid, texts, tokens)


class EvaluationSource:
    """Random access by batch: buckets in the config's order, in each the images in the data set's order.

    Of several processes each has every `process_count`-th batch.
    """

    def __init__(
        self, dataset: Dataset, config: DataConfig, batch_size: int, process_index: int = 0, process_count: int = 1
    ):
        groups: dict[int, list[tuple[Record, Geometry]]] = defaultdict(list)
        for record in dataset.records:
            geometry = evaluation_geometry(record.height, record.width, config)
            bucket = choose(geometry.size, config.buckets)
            fitted = Geometry(geometry.window, fit(geometry.size, config.buckets[bucket]))
            groups[bucket].append((record, fitted))
        self._batch_size, self._max_pixels = batch_size, config.max_pixels
        batches = [
            (config.buckets[bucket], members[i : i + batch_size])
            for bucket, members in sorted(groups.items())
            for i in range(0, len(members), batch_size)
        ]
        self._batches = batches[process_index::process_count]
        self.most = -(-len(batches) // process_count)  # batches that any process has

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, number: int) -> EvaluationBatch:
        bucket, members = self._batches[number]
        size = self._batch_size
        # A filler counts as a whole black picture, which every part of the model can deal with.
        pixels, mask = np.zeros((size, *bucket, 3), np.uint8), np.zeros((size, *bucket), np.bool_)
        mask[len(members) :] = True
        image_ids = np.full(size, -1, np.int64)
        original, resized = np.full((2, size, 2), bucket, np.int32)
        for i, (record, geometry) in enumerate(members):
            image = open_record(record, self._max_pixels)
            place(resample(image, geometry), pixels[i], mask[i])
            image_ids[i], original[i], resized[i] = record.image_id, (record.height, record.width), geometry.size
        return EvaluationBatch(Images(pixels, mask), image_ids, original, resized, len(members))


class EvaluationBatches:
    """Iterable any number of times, read ahead with threads; its length is the number of batches of this process."""

    def __init__(self, source: EvaluationSource, config: DataConfig):
        self._length, self.most = len(source), source.most
        self._stream = _read_ahead(source, config) if self._length else ()

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[EvaluationBatch]:
        return iter(self._stream)


def evaluation_batches(
    dataset: Dataset, config: DataConfig, batch_size: int, process_index: int = 0, process_count: int = 1
) -> EvaluationBatches:
    """Every image once, in a fixed order that groups buckets; of several processes each has its share of the batches.

    An image that cannot be read raises ImageError.
    """
    return EvaluationBatches(EvaluationSource(dataset, config, batch_size, process_index, process_count), config)
