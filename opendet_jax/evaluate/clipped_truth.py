"""True boxes that reach beyond their picture: how many there are, and what the numbers are when they are clipped.

Training clips them, and passes over those wholly outside; pycocotools and lvis evaluate on them as they are written, so
that a detector which is right to the pixel misses them. Method: docs/evaluate.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Int64
from numpy import ndarray

from opendet_jax.data.formats.records import Dataset
from opendet_jax.evaluate.evaluator import Evaluation, Evaluator, Protocol
from opendet_jax.evaluate.results import ScoredBoxes
from opendet_jax.evaluate.truth import Content

BEYOND = 1e-3  # pixels: as finely as detections are written; less is rounding
SHOWN = ("AP", "fixed_AP", "coco_AP")


@dataclass(frozen=True)
class Edges:
    beyond: int  # boxes that reach beyond their picture, those outside among them
    outside: int  # boxes without a part in it


def clip_truth(content: Content, dataset: Dataset) -> tuple[Content, Edges]:
    """What `lvis_truth` gives with every box clipped to its picture, without those outside; and how many these are.

    An object's area becomes that of what is left of its box, where it was more.
    """
    sizes = {record.image_id: (record.width, record.height) for record in dataset.records}
    kept, beyond, outside = [], 0, 0
    for annotation in content["annotations"]:
        clipped = _clipped(annotation, *sizes[annotation["image_id"]])
        beyond += clipped is not annotation
        outside += clipped is None
        if clipped is not None:
            kept.append(clipped)
    return {**content, "annotations": kept}, Edges(beyond, outside)


def _clipped(annotation: dict[str, Any], width: int, height: int) -> dict[str, Any] | None:
    """The annotation itself where its box is inside; None where it is outside."""
    x0, y0, w, h = annotation["bbox"]
    x1, y1 = x0 + w, y0 + h
    if max(-x0, -y0, x1 - width, y1 - height) <= BEYOND:
        return annotation
    if x0 >= width or y0 >= height or x1 <= 0 or y1 <= 0:
        return None
    x0, y0, x1, y1 = max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)
    w, h = x1 - x0, y1 - y0
    return {**annotation, "bbox": [x0, y0, w, h], "area": min(annotation["area"], w * h)}


class EdgeEvaluator:
    """An `Evaluator`, and beside it a second one on the clipped truth, where a box reaches beyond its picture.

    With `clipped` the clipped truth is the one that is evaluated on, and there is no second.
    """

    def __init__(self, content: Content, dataset: Dataset, protocol: Protocol = "lvis", clipped: bool = False):
        inside, self._edges = clip_truth(content, dataset)
        self._clipped = clipped
        self._main = Evaluator(inside if clipped else content, protocol)
        self._beside = Evaluator(inside, protocol) if self._edges.beyond and not clipped else None

    def add(
        self,
        image_id: int,
        detections: ScoredBoxes,
        boxes: ScoredBoxes | None = None,
        numbers: Int64[ndarray, " n"] | None = None,
    ) -> ScoredBoxes:
        """As that of `Evaluator`."""
        if self._beside:
            self._beside.add(image_id, detections, boxes, numbers)
        return self._main.add(image_id, detections, boxes, numbers)

    def finish(self) -> tuple[Evaluation, dict[str, Any]]:
        """The evaluation, and what its metrics.json has of the edges: nothing where there is nothing to say."""
        edges: dict[str, Any] = {"clip_truth": True} if self._clipped else {}
        if self._edges.beyond:
            edges |= {"boxes_beyond_picture": self._edges.beyond, "boxes_outside_picture": self._edges.outside}
        if self._beside:
            metrics = self._beside.finish().metrics
            edges |= {f"clipped_{key}": metrics[key] for key in SHOWN if key in metrics}
        return self._main.finish(), edges


def edges_said(metrics: Mapping[str, Any]) -> list[str]:
    """Lines for a summary of what metrics.json has of the edges."""
    if "boxes_beyond_picture" not in metrics:
        return []
    beyond, outside = metrics["boxes_beyond_picture"], metrics["boxes_outside_picture"]
    concerned = f"true boxes beyond their picture: {beyond}, of these {outside} wholly outside"
    if metrics.get("clip_truth"):
        return [f"  {concerned}; clipped, those outside passed over"]
    clipped = metrics["clipped_AP"]
    number = "–" if clipped is None else f"{100 * clipped:.1f}"
    return [f"  {concerned}; AP with them clipped, as in training: {number} (clip_truth)"]
