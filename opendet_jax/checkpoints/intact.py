"""Which checkpoints of a folder are complete and undamaged.

A checkpoint appears whole: Orbax writes it under another name and renames it at the end. Until then it is incomplete.
Just before that, checksums of all its files are added to it, so that what a disk or a copy did to it later is found
before it is used.
"""

import hashlib
import json
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from opendet_jax.errors import InputError
from opendet_jax.files import write_json

MANIFEST = "manifest.json"
UNFINISHED = ".orbax-checkpoint-tmp"  # in the name of a checkpoint that is still being written
DAMAGED = ".damaged"  # in the name of one that was set aside
LATER = (MANIFEST, "_CHECKPOINT_METADATA", "commit_success.txt")  # Orbax touches them once more after the checksums
NOTE = "run"  # an item that only checkpoints with a manifest have


class DamagedError(InputError):
    """A checkpoint whose files are not what was written."""


def steps(checkpoints: Path) -> list[int]:
    """The steps of the complete checkpoints, rising."""
    return sorted(int(path.name) for path in checkpoints.glob("*") if path.name.isdigit() and path.is_dir())


def unfinished(checkpoints: Path) -> list[Path]:
    """What saves that were cut off have left."""
    return sorted(path for path in checkpoints.glob(f"*{UNFINISHED}*"))


def unfinished_folder(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint of `step` is being written."""
    return checkpoints / f"{step}{UNFINISHED}"


def write_manifest(checkpoint: Path) -> None:
    """Adds the SHA-256 of every file."""
    files = [path for path in _files(checkpoint) if path.relative_to(checkpoint).as_posix() not in LATER]
    with ThreadPoolExecutor() as pool:
        sums = pool.map(_checksum, files)
    write_json(
        checkpoint / MANIFEST,
        {path.relative_to(checkpoint).as_posix(): total for path, total in zip(files, sums, strict=True)},
    )


def verify(checkpoint: Path, items: Collection[str] = ()) -> None:
    """Compares the files of `items` (none given: all) with their checksums.

    A checkpoint without any is of an earlier version, or of another program: there is nothing to compare.

    Raises:
        DamagedError: a file is missing, shorter, or has other bytes.
    """
    if not (checkpoint / MANIFEST).is_file():
        if (checkpoint / NOTE).exists():
            raise DamagedError(f"{checkpoint}: {MANIFEST} is missing")
        return
    compare(checkpoint, items)
    _verify_later(checkpoint)


def compare(folder: Path, items: Collection[str] = ()) -> None:
    """The files of `items` (none given: all) with the folder's checksums. Raises DamagedError as `verify` does."""
    manifest = folder / MANIFEST
    try:
        sums = json.loads(manifest.read_bytes())
        wanted = {name: str(sums[name]) for name in sums if not items or name.partition("/")[0] in items}
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise DamagedError(f"{manifest}: is damaged: {error}") from error
    present = {path.relative_to(folder).as_posix(): path for path in _files(folder)}
    missing = sorted(wanted.keys() - present.keys())
    if missing:
        raise DamagedError(f"{folder}: {missing[0]} is missing")
    with ThreadPoolExecutor() as pool:
        found = pool.map(_checksum, [present[name] for name in wanted])
    for name, total in zip(wanted, found, strict=True):
        if wanted[name] != total:
            raise DamagedError(f"{present[name]}: is damaged: it is not what was written")


def _verify_later(checkpoint: Path) -> None:
    """Orbax's own note, which has no checksum: it must be there and be json."""
    path = checkpoint / "_CHECKPOINT_METADATA"
    try:
        json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise DamagedError(f"{checkpoint}: {path.name} is missing") from error
    except ValueError as error:
        raise DamagedError(f"{path}: is damaged: {error}") from error


def newest_intact(checkpoints: Path, items: Collection[str] = ()) -> tuple[int | None, list[DamagedError]]:
    """The newest step whose `items` are undamaged (None: there is none), and what is wrong with the newer ones."""
    problems = []
    for step in reversed(steps(checkpoints)):
        try:
            verify(checkpoints / str(step), items)
        except DamagedError as error:
            problems.append(error)
        else:
            return step, problems
    return None, problems


def set_aside(checkpoint: Path) -> Path:
    """Renames a damaged checkpoint, so that its step can be saved again. Its new name."""
    number = 1
    while (path := checkpoint.with_name(f"{checkpoint.name}{DAMAGED}{number}")).exists():
        number += 1
    return checkpoint.rename(path)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
