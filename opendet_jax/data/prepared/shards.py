"""Writes the shards of a builder in parallel; those that are finished already are left as they are.

A folder that is being prepared knows what was begun in it, which shards are finished and what is in them.
"""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Lock
from typing import Any, NamedTuple

import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource
from tqdm import tqdm

from opendet_jax.data.images import ImageError
from opendet_jax.data.prepared.builders import DetectionBuilder, example
from opendet_jax.data.prepared.read import COMPLETE, WORK
from opendet_jax.errors import InputError
from opendet_jax.files import replacing, write_json

PLAN, LOCK = "plan.json", "lock"


class PrepareError(InputError):
    """Preparing cannot begin or go on; the message says why, and what is kept."""


class Note(NamedTuple):
    """What became of a shard's images."""

    stored: list[int]  # their places among the shard's records
    left_out: list[tuple[int, str]]  # places, and why
    bytes: int  # of the shard


class Preparation:
    """Of one plan (what decides over every byte) into one folder, by one process at a time."""

    def __init__(self, out: Path, plan: Mapping[str, Any]):
        self.out, self.work = out, out / WORK
        self.plan = dict(plan)

    @contextmanager
    def begun(self) -> Iterator[None]:
        """Holds the folder. Raises PrepareError where it is of another plan or in use."""
        self._refuse_strangers()
        self.work.mkdir(parents=True, exist_ok=True)
        with (self.work / LOCK).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise PrepareError(f"{self.out}: another process is preparing this folder") from error
            self._refuse_strangers()
            write_json(self.work / PLAN, self.plan)
            for part in [*self.out.glob(".*.part"), *self.work.glob(".*.part")]:  # of processes that were killed
                part.unlink()
            yield

    def _refuse_strangers(self) -> None:
        if not self.out.exists():
            return
        if not self.out.is_dir():
            raise PrepareError(f"{self.out}: is not a folder")
        plan = self.work / PLAN
        if plan.is_file():
            found = json.loads(plan.read_text(encoding="utf-8"))
            if found != self.plan:
                different = ", ".join(key for key in self.plan if found.get(key) != self.plan[key])
                raise PrepareError(
                    f"{self.out}: holds another preparation (different: {different}); delete it or name another folder"
                )
        elif any(path.name != WORK for path in self.out.iterdir()):
            raise PrepareError(f"{self.out}: is not empty; name another folder")

    def note(self, shard: int) -> Note | None:
        """Of a finished shard."""
        path = self._note_path(shard)
        if not path.is_file():
            return None
        found = json.loads(path.read_text(encoding="utf-8"))
        return Note(found["stored"], [(place, reason) for place, reason in found["left_out"]], found["bytes"])

    def finish(self, shard: int, note: Note) -> None:
        """To be called when the shard lies in its place."""
        write_json(self._note_path(shard), note._asdict(), indent=None)

    def _note_path(self, shard: int) -> Path:
        return self.work / f"{shard:05d}.json"

    def complete(self, made: Path) -> None:
        """Moves tfds's files from a folder to their places, that which says "complete" last, and forgets the notes."""
        for path in sorted(made.iterdir(), key=lambda path: path.name == COMPLETE):
            path.replace(self.out / path.name)
        shutil.rmtree(self.work)


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
