"""Files appear whole or not at all: written beside their place under another name, then moved over it."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary path in the same folder (made if missing), moved to `path` when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]  # the file's own may leave no room for more
    part = path.with_name(f".{name}.{os.getpid()}.part")
    try:
        yield part
        with suppress(OSError):  # some disks have no such permissions
            os.chmod(part, 0o666 & ~_umask())  # safetensors leaves what it writes to its owner alone
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _umask() -> int:
    """Of this process; only setting it tells."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def try_folder(folder: Path) -> None:
    """Raises OSError where no file could be written in a folder, which may not be there yet. Nothing is left behind."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    finally:
        for path in missing:
            with suppress(OSError):
                path.rmdir()


def write_json(path: Path, content: Any, indent: int | None = 1) -> None:
    """One JSON document; ValueError on NaN and infinity, which JSON does not have.

    What is no letter in UTF-8 (bytes of a file's name, half a character) is written as JSON's \\u escape of it.
    """
    with replacing(path) as part:
        text = json.dumps(content, ensure_ascii=False, allow_nan=False, indent=indent)
        part.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")
