"""What is found in an image: boxes, names, classes. And files of detections in the form of COCO and LVIS: ours written,
those of any program read and checked.
"""

import json
import os
from array import array
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64, Int64
from numpy import ndarray

from opendet_jax.data.formats.json_stream import lists_of
from opendet_jax.data.formats.records import clean_text
from opendet_jax.errors import InputError
from opendet_jax.evaluate.name_mapping import UNMAPPED, Bearers, Classes
from opendet_jax.evaluate.truth import is_box, is_number
from opendet_jax.files import replacing
from opendet_jax.inference import Found

Result = dict[str, Any]


@dataclass(frozen=True)
class ScoredBoxes:
    """n boxes, each of one class; a box may occur with several classes."""

    category_ids: Int64[ndarray, " n"]  # −1: its name is no class
    boxes: Float64[ndarray, "n 4"]  # x, y, w, h in pixels
    scores: Float64[ndarray, " n"]
    names: list[str] | None = None  # what each was called, where that is known
    shared: Int64[ndarray, " n"] | None = None  # as in `Classes`; None: the classes are settled
    bearers: Sequence[Bearers] = ()

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(self, rows: Int64[ndarray, " k"]) -> "ScoredBoxes":
        names = None if self.names is None else [self.names[row] for row in rows.tolist()]
        shared = None if self.shared is None else self.shared[rows]
        return ScoredBoxes(self.category_ids[rows], self.boxes[rows], self.scores[rows], names, shared, self.bearers)

    def best_first(self) -> Int64[ndarray, " n"]:
        """Of equal scores the earlier is better."""
        return np.argsort(-self.scores, kind="stable")

    def distinct_boxes(self) -> "ScoredBoxes":
        """Each box once, as its best class."""
        if not len(self):
            return self
        order = self.best_first()
        _, first = np.unique(self.boxes[order], axis=0, return_index=True)
        return self[order[np.sort(first)]]


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

    def boxes(self) -> ScoredBoxes:
        """Each box as its best class, with its own score p."""
        classes = self.classes
        best = classes.ids[:, 0] if classes.ids.size else np.full(len(self.bboxes), UNMAPPED)
        shared = None if classes.shared is None else classes.shared[:, 0]
        names = [beams[0] for beams in self.found.names]
        return ScoredBoxes(best, self.bboxes, self.found.scores.astype(np.float64), names, shared, classes.bearers)

    def detections(self) -> ScoredBoxes:
        """Every box as every class of its, best first; of equal scores the better box, then its better class."""
        box, rank = self._best_first
        names = [self.found.names[row][0] for row in box.tolist()]
        classes = self.classes
        scores = classes.scores[box, rank].astype(np.float64)
        shared = None if classes.shared is None else classes.shared[box, rank]
        return ScoredBoxes(classes.ids[box, rank], self.bboxes[box], scores, names, shared, classes.bearers)

    def entries(self, limit: int, category_ids: Int64[ndarray, " m"] | None = None) -> list[Result]:
        """The `limit` best detections for a file; category_id −1 says that the name is no class.

        `category_ids` are those of all `detections`, once they are settled (None: as they are). Names and their scores
        run from best to worst beam and are those of the box, whichever its class.
        """
        box, rank = (column[:limit] for column in self._best_first)
        settled = self.classes.ids[box, rank] if category_ids is None else category_ids[:limit]
        name_scores = self.found.name_scores.astype(np.float64).round(5).tolist()
        return [
            {
                "image_id": self.image_id,
                "category_id": category_id,
                "bbox": bbox,
                "score": score,
                "names": self.found.names[row],
                "name_scores": name_scores[row][: len(self.found.names[row])],
            }
            for row, category_id, bbox, score in zip(
                box.tolist(),
                settled.tolist(),
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
    """A function that appends to a json list, one detection a line; the file appears when the block ends well.

    Where Ctrl-C ends it, what has been appended is in `so_far(path)`.
    """
    with replacing(path) as part:
        try:
            with _json_list(part) as add:
                yield add
        except KeyboardInterrupt:
            os.replace(part, so_far(path))
            raise
    so_far(path).unlink(missing_ok=True)


@contextmanager
def _json_list(path: Path) -> Iterator[Callable[[list[Result]], None]]:
    with path.open("w", encoding="utf-8", errors="backslashreplace") as file:  # as `write_json` does
        before = "[\n"

        def add(results: list[Result]) -> None:
            nonlocal before
            for result in results:
                file.write(before + json.dumps(result, ensure_ascii=False, allow_nan=False))
                before = ",\n"

        try:
            yield add
        finally:
            file.write("\n]\n" if file.tell() else "[]\n")


def so_far(path: Path) -> Path:
    """What is written in the place of a results file that is not finished: predictions_so_far.json."""
    return path.with_name(f"{path.stem}_so_far{path.suffix}")


class ResultsError(InputError):
    """Detections that cannot be scored: the message names the file, the record and what is wrong with it."""


class OfImage(NamedTuple):
    image_id: int
    detections: ScoredBoxes
    numbers: Int64[ndarray, " n"]  # their places in the file


@dataclass(frozen=True)
class Results:
    image_ids: Int64[ndarray, " n"]
    detections: ScoredBoxes

    def __len__(self) -> int:
        return len(self.detections)

    @property
    def images(self) -> int:
        """Those with a detection."""
        return len(np.unique(self.image_ids))

    def by_image(self, image_ids: Set[int] | None = None) -> Iterator[OfImage]:
        """Each image's detections, in the file's order; of these images only, None: of all."""
        rows = np.argsort(self.image_ids, kind="stable")
        present, starts = np.unique(self.image_ids[rows], return_index=True)
        for image_id, numbers in zip(present.tolist(), np.split(rows, starts[1:]), strict=False):
            if image_ids is None or image_id in image_ids:
                yield OfImage(image_id, self.detections[numbers], numbers)


def read_results(path: Path, image_ids: Set[int], category_ids: Set[int]) -> Results:
    """Records with image_id, category_id (−1: its name is no class), bbox (x, y, width, height in pixels) and score.

    "names", where every record has them, are what the box was called, the best first; an "id" may not occur twice.
    Other fields are not looked at. Memory holds numbers, not the json. Raises ResultsError, AnnotationError (not json).
    """
    reader, listed = _Reader(path, image_ids, {*category_ids, UNMAPPED}), False
    for key, records in lists_of(path):
        if key:
            break
        listed = True
        for number, record in enumerate(records):
            reader.add(number, record)
    if not listed:
        raise ResultsError(f"{path}: is not a list of detections")
    return reader.results()


@dataclass
class _Reader:
    path: Path
    image_ids: Set[int]
    category_ids: Set[int]
    _images: array = field(default_factory=lambda: array("q"))
    _categories: array = field(default_factory=lambda: array("q"))
    _boxes: array = field(default_factory=lambda: array("d"))
    _scores: array = field(default_factory=lambda: array("d"))
    _names: list[str] = field(default_factory=list)
    _known_names: dict[str, str] = field(default_factory=dict)  # equal ones are one object in memory
    _ids: set[int] = field(default_factory=set)

    def add(self, number: int, record: Any) -> None:
        if not isinstance(record, dict):
            raise self._error(number, f"is {record!r:.40}, not a detection")
        image_id, category_id, bbox, score = (
            self._field(number, record, name) for name in ("image_id", "category_id", "bbox", "score")
        )
        if type(image_id) is not int or image_id not in self.image_ids:
            raise self._error(number, f"image_id {image_id!r:.40} is not in the annotations")
        if type(category_id) is not int or category_id not in self.category_ids:
            raise self._error(number, f"category_id {category_id!r:.40} is not in the annotations")
        if not is_box(bbox):
            raise self._error(
                number, f"bbox {bbox!r:.80} is not x, y, width, height: finite, and the last two not negative"
            )
        if not is_number(score) or score < 0:
            raise self._error(number, f"score {score!r:.40} is not a number from 0 on")
        self._check_id(number, record)
        self._images.append(image_id)
        self._categories.append(category_id)
        self._boxes.extend(bbox)
        self._scores.append(score)
        self._add_name(number, record)

    def results(self) -> Results:
        names = self._names if len(self._names) == len(self._scores) and self._names else None
        image_ids, category_ids = (np.array(column, np.int64) for column in (self._images, self._categories))
        boxes = np.array(self._boxes, np.float64).reshape(-1, 4)
        return Results(image_ids, ScoredBoxes(category_ids, boxes, np.array(self._scores, np.float64), names))

    def _field(self, number: int, record: dict[str, Any], name: str) -> Any:
        if name not in record:
            raise self._error(number, f"has no field {name!r}")
        return record[name]

    def _check_id(self, number: int, record: dict[str, Any]) -> None:
        if type(record.get("id")) is int:
            if record["id"] in self._ids:
                raise self._error(number, f"id {record['id']} occurs twice")
            self._ids.add(record["id"])

    def _add_name(self, number: int, record: dict[str, Any]) -> None:
        names = record.get("names")
        if names is not None:
            if not isinstance(names, list) or not names or not isinstance(names[0], str):
                raise self._error(number, f"names {names!r:.40} is not a list of strings")
            name = clean_text(names[0])
            self._names.append(self._known_names.setdefault(name, name))

    def _error(self, number: int, what: str) -> ResultsError:
        return ResultsError(f"{self.path}: record {number}: {what}")
