"""What training does about images that cannot be read: skip them, count them, stop when they are too many."""

from pathlib import Path
from threading import Lock

from absl import logging

from opendet_jax.data.images import ImageError

ESTIMATE = 1000  # images: earlier, the share is taken of this many
NAMED = 5  # files that the error names


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
