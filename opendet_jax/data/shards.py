"""Pictures in the array_record shards of a prepared folder."""

from pathlib import Path
from threading import Lock
from typing import Any

PICTURE = "image"  # the feature with a picture's file as it was, not decoded


class Shards:
    """Encoded pictures by number, over all shards in order. Shards are opened when first used; safe for threads."""

    def __init__(self, folder: Path):
        self.__setstate__(folder)

    def __getitem__(self, number: int) -> bytes:
        with self._lock:
            if self._source is None:
                self._source = _open(self._folder)
        return self._source[number][PICTURE]

    def __getstate__(self) -> Path:
        return self._folder

    def __setstate__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = Lock()
        self._source: Any = None


def _open(folder: Path) -> Any:
    import tensorflow_datasets as tfds  # takes seconds, and only prepared folders need it

    builder: Any = tfds.builder_from_directory(folder)
    [split] = builder.info.splits
    return builder.as_data_source(split, decoders={PICTURE: tfds.decode.SkipDecoding()})
