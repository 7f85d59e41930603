"""Writes the shards of a builder in parallel; those that are finished already are left as they are."""

import errno
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event, Lock

import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource
from tqdm import tqdm

from opendet_jax.data.images import ImageError
from opendet_jax.data.prepared.builders import DetectionBuilder, example
from opendet_jax.data.prepared.state import Note, Preparation
from opendet_jax.files import replacing


def write_shards(builder: DetectionBuilder, preparation: Preparation, workers: int, progress: bool) -> list[Note]:
    """What became of every shard's images. The first error in a thread ends all of them; what is finished is kept.

    Raises OSError where a file cannot be written.
    """
    total = sum(len(shard) for shard in builder.shards)
    with tqdm(total=total, desc=f"prepare {builder.name}", unit="image", disable=not progress) as bar:
        writer = _Writer(builder, preparation, bar)
        with ThreadPoolExecutor(workers) as pool:
            try:
                return list(pool.map(writer.write, range(len(builder.shards))))
            except BaseException as error:  # an interruption too
                writer.stop.set()
                pool.shutdown(cancel_futures=True)
                raise writer.error or error from None


class _Stopped(Exception):
    """A shard is given up because another thread has failed."""


class _Writer:
    def __init__(self, builder: DetectionBuilder, preparation: Preparation, bar: tqdm):
        self._builder, self._preparation = builder, preparation
        self._bar, self._lock = bar, Lock()
        self._file = tfds.core.ExampleWriter(file_format=tfds.core.FileFormat.ARRAY_RECORD)
        self.stop = Event()
        self.error: Exception | None = None  # what stopped all threads

    def write(self, number: int) -> Note:
        if self.stop.is_set():
            raise _Stopped
        try:
            note = self._preparation.note(number)
            if note is None:
                return self._write(number)
            self._advance(len(self._builder.shards[number]))
            return note
        except Exception as error:
            with self._lock:
                if not self.stop.is_set():
                    self.error = error
                    self.stop.set()
            raise

    def _write(self, number: int) -> Note:
        stored: list[int] = []
        left_out: list[tuple[int, str]] = []
        path = shard_path(self._builder, self._preparation.out, number)
        with replacing(path) as part:
            try:
                self._file.write(part, self._serialised(number, stored, left_out))
            except RuntimeError as error:
                raise _as_os_error(error) from error
            _check(part, len(stored))
        note = Note(stored, left_out, path.stat().st_size)
        self._preparation.finish(number, note)
        return note

    def _serialised(
        self, number: int, stored: list[int], left_out: list[tuple[int, str]]
    ) -> Iterator[tuple[int, bytes]]:
        for place, record in enumerate(self._builder.shards[number]):
            if self.stop.is_set():
                raise _Stopped
            try:
                content = self._builder.serialised(example(record, self._builder.max_pixels))
            except ImageError as error:
                left_out.append((place, str(error)))
            else:
                stored.append(place)
                yield place, content
            self._advance(1)

    def _advance(self, images: int) -> None:
        with self._lock:
            self._bar.update(images)


def shard_path(builder: DetectionBuilder, folder: Path, number: int) -> Path:
    """tfds's name of a shard: "lvis_v1-train.array_record-00000-of-00025"."""
    template = tfds.core.ShardedFileTemplate(
        data_dir=tfds.core.Path(folder),
        dataset_name=builder.name,
        split=builder.split,
        filetype_suffix="array_record",
    )
    return Path(template.sharded_filepath(shard_index=number, num_shards=len(builder.shards)))


def _as_os_error(error: RuntimeError) -> OSError:
    """array_record's writer has only words for what the system answered."""
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
        if os.strerror(number) in str(error):
            return OSError(number, os.strerror(number))
    return OSError(str(error))


def _check(path: Path, records: int) -> None:
    """Raises OSError where a file does not hold what was written, as on a full disk."""
    found = len(ArrayRecordDataSource(str(path)))
    if found != records:
        raise OSError(f"{path}: holds {found} of {records} records")
