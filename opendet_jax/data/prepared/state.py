"""The state of a folder that is being prepared: what was begun, which shards are finished and what is in them."""

import fcntl
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from opendet_jax.data.prepared.read import COMPLETE, WORK
from opendet_jax.errors import InputError
from opendet_jax.files import write_json

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
