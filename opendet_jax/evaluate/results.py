"""What is found in one image: boxes, names, classes. And detections in the form of COCO's and LVIS's result files."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64
from numpy import ndarray

from opendet_jax.evaluate.detections import Detections
from opendet_jax.evaluate.name_mapping import UNMAPPED, Classes
from opendet_jax.files import replacing
from opendet_jax.inference import Found

Result = dict[str, Any]


@dataclass(frozen=True)
class ImageResults:
    """One image's n boxes with their k classes each, which are n·k detections."""

    image_id: int
    found: Found
    classes: Classes

    @cached_property
    def bboxes(self) -> Float64[ndarray, "n 4"]:
        """(x, y, width, height) in pixels, to a thousandth."""
        corners = self.found.boxes.astype(np.float64)
        return np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1).round(3)

    def boxes(self) -> Detections:
        """Each box as its best class, with its own score p."""
        best = self.classes.ids[:, 0] if self.classes.ids.size else np.full(len(self.bboxes), UNMAPPED)
        names = [beams[0] for beams in self.found.names]
        return Detections(best, self.bboxes, self.found.scores.astype(np.float64), names)

    def detections(self) -> Detections:
        """Every box as every class of its, best first; of equal scores the better box, then its better class."""
        box, rank = self._best_first
        names = [self.found.names[row][0] for row in box.tolist()]
        scores = self.classes.scores[box, rank].astype(np.float64)
        return Detections(self.classes.ids[box, rank], self.bboxes[box], scores, names)

    def entries(self, limit: int) -> list[Result]:
        """The `limit` best detections for a file; category_id −1 says that the name is no class.

        Names and their scores run from best to worst beam and are those of the box, whichever its class.
        """
        box, rank = (column[:limit] for column in self._best_first)
        name_scores = self.found.name_scores.astype(np.float64).round(5).tolist()
        return [
            {
                "image_id": self.image_id,
                "category_id": category_id,
                "bbox": bbox,
                "score": score,
                "names": self.found.names[row],
                "name_scores": name_scores[row],
            }
            for row, category_id, bbox, score in zip(
                box.tolist(),
                self.classes.ids[box, rank].tolist(),
                self.bboxes[box].tolist(),
                self.classes.scores[box, rank].tolist(),
                strict=True,
            )
        ]

    @cached_property
    def _best_first(self) -> tuple[Int64[ndarray, " m"], Int64[ndarray, " m"]]:
        order = np.argsort(-self.classes.scores, axis=None, kind="stable")
        box, rank = np.unravel_index(order, self.classes.scores.shape)
        return box, rank


@contextmanager
def results_file(path: Path) -> Iterator[Callable[[list[Result]], None]]:
    """A function that appends to a json list, one detection a line; the file appears when the block ends well."""
    with replacing(path) as part, part.open("w", encoding="utf-8") as file:
        before = "[\n"

        def add(results: list[Result]) -> None:
            nonlocal before
            for result in results:
                file.write(before + json.dumps(result, ensure_ascii=False, allow_nan=False))
                before = ",\n"

        yield add
        file.write("\n]\n" if before == ",\n" else "[]\n")
