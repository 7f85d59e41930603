"""Average precision by the protocols of LVIS (two of them) and of COCO.

LVIS's own looks at the 300 best detections of an image. "Fixed AP" (Dave et al. 2021, "Evaluating Large-Vocabulary
Object Detectors: The Devil is in the Details") has no limit an image, but one a class: its 10,000 best over the data
set, chosen among all its detections, also those on images where the class is not judged. COCO's looks at the 100 best
detections of a class in an image. Matching and averaging are the same.

A class may be of group "u" (never seen in training), reported apart and not part of AP, or of no group (data without
frequencies), part of AP only.

Method: docs/method.md#13-evaluation.
"""

import numpy as np
from jaxtyping import Int32
from numpy import ndarray

from opendet_jax.evaluate.average_precision import BestOfEachClass, Curves, Outcomes, Uncounted, curves
from opendet_jax.evaluate.truth import SEEN_GROUPS, Truth

Metrics = dict[str, float | None]
PER_IMAGE = 300  # detections of an image, LVIS's own protocol
PER_CLASS = 10_000  # detections of a class over the data set, fixed AP
PER_CLASS_AND_IMAGE = 100
FEWER = (1, 10)  # to which recall is reported too


class LvisProtocols:
    """Image by image: `add`; at the end: `curves`, `fixed_curves`."""

    def __init__(self, truth: Truth, per_image: int = PER_IMAGE, per_class: int = PER_CLASS):
        self._truth, self._per_image = truth, per_image
        self._lvis: list[Outcomes] = []
        self._fixed = BestOfEachClass(len(truth.categories), per_class)

    def add(self, known: Outcomes, others: Uncounted) -> None:
        """All detections of an image: those that count, best first, and the others."""
        self._lvis.append(known[known.rank < self._per_image])
        self._fixed.add(known, others)

    def curves(self) -> Curves:
        return curves(Outcomes.join(self._lvis), self._truth.wanted)

    def fixed_curves(self) -> Curves:
        return curves(self._fixed.best(), self._truth.wanted)


def lvis_metrics(truth: Truth, found: Curves, prefix: str = "") -> Metrics:
    """AP over IoU 0.5…0.95, at 0.5 and 0.75, of the groups r, c, f, u, by size of object; AR over the same IoU."""
    seen = truth.classes_of(SEEN_GROUPS)
    sizes = {"s": "small", "m": "medium", "l": "large"}
    metrics = {
        "AP": found.ap(seen),
        "AP50": found.ap(seen, iou=0.5),
        "AP75": found.ap(seen, iou=0.75),
        **{f"AP{group}": found.ap(truth.classes_of([group])) for group in "rcfu"},
        **{f"AP{letter}": found.ap(seen, area=area) for letter, area in sizes.items()},
        "AR": found.ar(seen),
        **{f"AR{letter}": found.ar(seen, area=area) for letter, area in sizes.items()},
    }
    return {prefix + key: value for key, value in metrics.items()}


class CocoProtocol:
    """Image by image: `add`; at the end: `curves` and `metrics`."""

    def __init__(self, truth: Truth):
        self._truth = truth
        self._kept: list[Outcomes] = []
        self._ranks: list[Int32[ndarray, " n"]] = []  # in class and image

    def add(self, known: Outcomes) -> None:
        """One image's detections that count, best first."""
        ranks = _ranks_in_class(known.category)
        self._kept.append(known[ranks < PER_CLASS_AND_IMAGE])
        self._ranks.append(ranks[ranks < PER_CLASS_AND_IMAGE])

    def curves(self) -> Curves:
        return curves(Outcomes.join(self._kept), self._truth.wanted)

    def metrics(self, found: Curves, prefix: str = "") -> Metrics:
        """pycocotools' twelve numbers; `found` is what `curves` gives."""
        sizes = {"s": "small", "m": "medium", "l": "large"}
        metrics = {
            "AP": found.ap(),
            "AP50": found.ap(iou=0.5),
            "AP75": found.ap(iou=0.75),
            **{f"AP{letter}": found.ap(area=area) for letter, area in sizes.items()},
            **{f"AR{limit}": self._best(limit).ar() for limit in FEWER},
            f"AR{PER_CLASS_AND_IMAGE}": found.ar(),
            **{f"AR{letter}": found.ar(area=area) for letter, area in sizes.items()},
        }
        return {prefix + key: value for key, value in metrics.items()}

    def _best(self, limit: int) -> Curves:
        best = [kept[ranks < limit] for kept, ranks in zip(self._kept, self._ranks, strict=True)]
        return curves(Outcomes.join(best), self._truth.wanted, areas=("all",))


def _ranks_in_class(category: Int32[ndarray, " n"]) -> Int32[ndarray, " n"]:
    """Of detections, best first, how many of the same class are better."""
    by_class = np.argsort(category, kind="stable")
    ordered = category[by_class]
    first = np.searchsorted(ordered, ordered, side="left")
    ranks = np.empty(len(category), np.int32)
    ranks[by_class] = np.arange(len(category)) - first
    return ranks
