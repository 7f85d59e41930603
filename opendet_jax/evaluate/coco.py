"""Average precision and recall by COCO's protocol: the 100 best detections of a class in an image."""

import numpy as np
from jaxtyping import Int32
from numpy import ndarray

from opendet_jax.evaluate.curves import Curves, curves
from opendet_jax.evaluate.lvis import Metrics
from opendet_jax.evaluate.outcomes import Outcomes
from opendet_jax.evaluate.truth_index import Truth

PER_CLASS_AND_IMAGE = 100
FEWER = (1, 10)  # to which recall is reported too


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
