"""The evaluation of a data set, one image at a time: memory holds a few numbers a detection, and the best only."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Int64
from numpy import ndarray

from opendet_jax.evaluate.average_precision import Curves, Outcomes, Uncounted
from opendet_jax.evaluate.greedy_matching import AT_50, match
from opendet_jax.evaluate.localisation import Localisation
from opendet_jax.evaluate.protocols import PER_IMAGE, CocoProtocol, LvisProtocols, Metrics, lvis_metrics
from opendet_jax.evaluate.results import ScoredBoxes
from opendet_jax.evaluate.shared_names import settle
from opendet_jax.evaluate.truth import ImageTruth, Truth

Protocol = Literal["lvis", "lvis_fixed", "coco"]


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
        self._coco = CocoProtocol(self.truth) if protocol == "coco" or self.truth.is_coco else None
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
        known = Outcomes.of_image(image.place, outcome, judged, score[counts], np.flatnonzero(counts), numbers[counts])
        if self._lvis:
            self._lvis.add(known, Uncounted(category[~counts].astype(np.int32), score[~counts], numbers[~counts]))
        if self._coco:
            self._coco.add(known[known.rank < PER_IMAGE] if self._lvis else known)
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
