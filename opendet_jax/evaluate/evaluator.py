"""The evaluation of a data set, one image at a time: memory holds a few numbers a detection, and the best only.

Method: docs/method.md#13-evaluation.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import pycocotools.mask
from jaxtyping import Float64, Int64
from numpy import ndarray

from opendet_jax.data.formats.records import Dataset
from opendet_jax.evaluate.average_precision import Curves, Outcomes, Uncounted
from opendet_jax.evaluate.greedy_matching import AT_50, THRESHOLDS, match
from opendet_jax.evaluate.localisation import Localisation
from opendet_jax.evaluate.name_mapping import Bearers
from opendet_jax.evaluate.protocols import PER_IMAGE, CocoProtocol, LvisProtocols, Metrics, lvis_metrics
from opendet_jax.evaluate.results import ScoredBoxes
from opendet_jax.evaluate.truth import Content, ImageTruth, Truth

Protocol = Literal["lvis", "lvis_fixed", "coco"]
BEYOND = 1e-3  # pixels: as finely as detections are written; less is rounding
SHOWN = ("AP", "fixed_AP", "coco_AP")  # of which clipped truth has its own


class ImageScore(NamedTuple):
    image_id: int
    share: float  # of the n best detections that count, in an image of n objects, those that are true at IoU 0.5
    objects: int  # n


class Evaluation(NamedTuple):
    """All there is to report."""

    truth: Truth
    metrics: Metrics
    curves: dict[str, Curves]  # by what the keys of their metrics begin with: "", "fixed_", "coco_"
    localisation: Localisation
    counted: Int64[ndarray, " C"]  # detections of each class that count
    images: list[ImageScore]  # those with an object


class Evaluator:
    """`add` images that have detections, each once, then `finish`.

    content: the truth in LVIS's form (see `lvis_truth`).
    protocol: "lvis" and "lvis_fixed" are one here, both are computed; of a truth that knows every class in every image
        and no frequencies, COCO's numbers too, of the 300 best detections an image, as "coco_…". "coco": COCO's numbers
        alone, of all detections, without a prefix.
    """

    def __init__(self, content: Mapping[str, Any], protocol: Protocol = "lvis"):
        self.truth = Truth(content, federated=protocol != "coco")
        self._lvis = LvisProtocols(self.truth) if protocol != "coco" else None
        # COCO's protocol does not know "ignore": its truth is another one where there are such boxes.
        ignores = any(
            annotation.get("ignore") and not annotation.get("iscrowd") for annotation in content["annotations"]
        )
        self._coco_truth = Truth(content, federated=False) if ignores and self._lvis else self.truth
        self._coco = CocoProtocol(self._coco_truth) if protocol == "coco" or self.truth.is_coco else None
        self._localisation = Localisation(self.truth)
        self._counted = np.zeros(len(self.truth.categories), np.int64)
        self._images: dict[int, ImageScore] = {}
        self._numbered = 0

    def add(
        self,
        image_id: int,
        detections: ScoredBoxes,
        boxes: ScoredBoxes | None = None,
        numbers: Int64[ndarray, " n"] | None = None,
    ) -> ScoredBoxes:
        """Detections of an image, and its distinct boxes, each as its best class (None: those of the detections).

        Returns the detections with the classes that they were counted for: of a name that several bear, one.
        `numbers` are the detections' places in their file, which break ties between images (None: in the order in which
        they are added). Raises ValueError for an image that is not in the data set, or was added before.
        """
        if image_id not in self.truth.images:
            raise ValueError(f"detections on an image that is not in the data set: {image_id}")
        if image_id in self._images:
            raise ValueError(f"image {image_id} is added twice")
        image = self.truth.images[image_id]
        detections = settle(detections, image, self.truth)
        boxes = detections.distinct_boxes() if boxes is None else settle(boxes, image, self.truth)
        if numbers is None:
            numbers = self._numbered + np.arange(len(detections))
            self._numbered += len(detections)
        order = detections.best_first()
        category = self.truth.places(detections.category_ids)[order]
        score, numbers = detections.scores[order], numbers[order]
        counts = self.truth.mask(image.judged)[category]
        judged = category[counts]
        lenient = self.truth.mask(image.lenient)[judged]
        outcome = match(judged, detections.boxes[order[counts]], lenient, image.objects)
        known_by = judged, score[counts], np.flatnonzero(counts), numbers[counts]
        known = Outcomes.of_image(image.place, outcome, *known_by)
        if self._lvis:
            self._lvis.add(known, Uncounted(category[~counts].astype(np.int32), score[~counts], numbers[~counts]))
        if self._coco:
            if self._coco_truth is not self.truth:  # every class is judged, so that all detections count in both
                objects = self._coco_truth.images[image_id].objects
                outcome = match(judged, detections.boxes[order[counts]], lenient, objects)
                coco = Outcomes.of_image(image.place, outcome, *known_by)
            else:
                coco = known
            self._coco.add(coco[coco.rank < PER_IMAGE] if self._lvis else coco)
        self._localisation.add(image, boxes)
        self._counted += np.bincount(known.category, minlength=len(self._counted))
        self._images[image_id] = _image_score(image_id, image, known)
        return detections

    def finish(self) -> Evaluation:
        """The metrics, None where there is nothing to measure, and what they come from."""
        metrics: Metrics = {}
        found: dict[str, Curves] = {}
        if self._lvis:
            found[""], found["fixed_"] = self._lvis.curves(), self._lvis.fixed_curves()
            metrics |= lvis_metrics(self.truth, found[""]) | lvis_metrics(self.truth, found["fixed_"], "fixed_")
        if self._coco:
            prefix = "coco_" if self._lvis else ""
            found[prefix] = self._coco.curves()
            metrics |= self._coco.metrics(found[prefix], prefix)
        metrics |= self._localisation.metrics()
        nothing = Outcomes.join([])
        scores = [
            self._images.get(image_id) or _image_score(image_id, image, nothing)
            for image_id, image in self.truth.images.items()
        ]
        images = [score for score in scores if score.objects]
        return Evaluation(self.truth, metrics, found, self._localisation, self._counted, images)


def _image_score(image_id: int, image: ImageTruth, known: Outcomes) -> ImageScore:
    objects = int(np.count_nonzero(image.objects.wanted & np.uint64(AT_50)))
    best = np.flatnonzero((known.true | known.false) & np.uint64(AT_50))[:objects]
    right = int(np.count_nonzero(known.true[best] & np.uint64(AT_50)))
    return ImageScore(image_id, right / objects if objects else 0.0, objects)


def settle(found: ScoredBoxes, image: ImageTruth, truth: Truth) -> ScoredBoxes:
    """Detections of an image with the one class that each counts for.

    Where several classes bear a detection's name (data sets are merged, and exported with a root class that has no box)
    it is that of them which has truth in the image, else the first that has any in the data set. Of several with truth
    in the image it is that of the object which the detection overlaps most. docs/name_mapping.md has the rule.
    """
    if found.shared is None:
        return found
    category_ids = found.category_ids.copy()
    for number in np.unique(found.shared[found.shared >= 0]).tolist():
        rows = np.flatnonzero(found.shared == number)
        places = _chosen(found.bearers[number], found.boxes[rows], image, truth)
        category_ids[rows] = truth.category_ids[places]
    return replace(found, category_ids=category_ids, shared=None)


def _chosen(bearers: Bearers, boxes: Float64[ndarray, "n 4"], image: ImageTruth, truth: Truth) -> Int64[ndarray, " n"]:
    """The class of each box, as its place in the truth."""
    groups = [truth.places(np.array(ids, np.int64)) for ids in bearers]
    present = [group[truth.wanted[group, 0] > 0] for group in groups]
    number = next((number for number, some in enumerate(present) if len(some)), 0)
    group, objects = groups[number], image.objects
    here = np.flatnonzero(np.isin(objects.category, group))
    if not len(here):
        some = present[number] if len(present[number]) else group
        judged = some[np.isin(some, image.judged)]  # a class that is known to be absent: a mistake that counts
        return np.full(len(boxes), (judged if len(judged) else some)[0])
    wanted = objects.wanted[here] & np.uint64(AT_50) > 0
    iou = np.asarray(pycocotools.mask.iou(boxes, objects.boxes[here], objects.crowd[here].astype(np.uint8)))
    # What is to be ignored is taken only where nothing wanted can be had, as in matching.
    value = iou + (wanted & (iou >= THRESHOLDS[0]))
    first = np.lexsort((objects.category[here], ~wanted))  # of equal overlap, or none at all: wanted, smaller id
    return objects.category[here[first[np.argmax(value[:, first], axis=1)]]]


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

    Training clips such boxes; pycocotools and lvis evaluate on them as they are written, so that a detector which is
    right to the pixel misses them. With `clipped` the clipped truth is evaluated on, and there is no second.
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
