"""From outcomes to precision over recall, and its means: AP and AR, as the packages lvis and pycocotools have them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64, Int64
from numpy import ndarray

from opendet_jax.evaluate.matching import AREAS, THRESHOLDS
from opendet_jax.evaluate.outcomes import Outcomes

RECALLS = np.linspace(0, 1, 101)
NOTHING = -1.0  # where there is no object to be found


@dataclass(frozen=True)
class Curves:
    precision: Float64[ndarray, "C areas thresholds recalls"]  # the highest at this recall or beyond; NOTHING
    recall: Float64[ndarray, "C areas thresholds"]  # the highest reached; NOTHING

    def ap(
        self, classes: Int64[ndarray, " k"] | None = None, iou: float | None = None, area: str = "all"
    ) -> float | None:
        """Mean over classes (default: all), IoU 0.5…0.95 (or one) and recalls; None with nothing to be found."""
        return _mean(self._part(self.precision, classes, iou, area))

    def ar(
        self, classes: Int64[ndarray, " k"] | None = None, iou: float | None = None, area: str = "all"
    ) -> float | None:
        """Mean over classes and IoU of the highest recall; None with nothing to be found."""
        return _mean(self._part(self.recall, classes, iou, area))

    def _part(self, values: ndarray, classes: Int64[ndarray, " k"] | None, iou: float | None, area: str) -> ndarray:
        part = values[:, list(AREAS).index(area)]
        part = part if classes is None else part[classes]
        return part if iou is None else part[:, np.isclose(THRESHOLDS, iou)]


def _mean(values: ndarray) -> float | None:
    defined = values[values > NOTHING]
    return float(defined.mean()) if defined.size else None


def curves(outcomes: Outcomes, wanted: Int64[ndarray, "C areas"], areas: Sequence[str] = tuple(AREAS)) -> Curves:
    """`wanted` are the objects to be found; ranges of area that are not in `areas` stay without a curve."""
    shape = (*wanted.shape, len(THRESHOLDS))
    precision, recall = np.full((*shape, len(RECALLS)), NOTHING), np.full(shape, NOTHING)
    # Best first; of equal scores by image, as the packages put it.
    order = np.lexsort((outcomes.rank, outcomes.image, -outcomes.score, outcomes.category))
    true, false, category = outcomes.true[order], outcomes.false[order], outcomes.category[order]
    ends = np.searchsorted(category, np.arange(len(wanted)), side="right")
    for place, (start, end) in enumerate(zip(np.r_[0, ends[:-1]], ends, strict=True)):
        own_true, own_false = true[start:end], false[start:end]
        hit = int(np.bitwise_or.reduce(own_true))  # the matchings with a true detection: the others' curves are 0
        for area, name in enumerate(AREAS):
            objects = int(wanted[place, area])
            if objects and name in areas:
                precision[place, area], recall[place, area] = 0, 0
                for threshold in range(len(THRESHOLDS)):
                    bit = 1 << (area * len(THRESHOLDS) + threshold)
                    if hit & bit:
                        curve = _curve(own_true & np.uint64(bit) > 0, own_false & np.uint64(bit) > 0, objects)
                        precision[place, area, threshold], recall[place, area, threshold] = curve
    return Curves(precision, recall)


def _curve(
    true: Bool[ndarray, " n"], false: Bool[ndarray, " n"], objects: int
) -> tuple[Float64[ndarray, " recalls"], float]:
    """One class in one matching. Precision is highest at a true detection, so that only these need be looked at."""
    hits = np.flatnonzero(true)
    mistakes = np.cumsum(false)[hits]
    count = np.arange(1, len(hits) + 1)
    precision = count / (mistakes + count + np.spacing(1))  # the packages guard against 0 / 0 so
    highest_beyond = np.maximum.accumulate(precision[::-1])[::-1]
    recall = count / objects
    reached = np.searchsorted(recall, RECALLS, side="left")
    return np.append(highest_beyond, 0.0)[reached], float(recall[-1])
