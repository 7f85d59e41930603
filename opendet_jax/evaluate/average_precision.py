"""From the outcomes of detections to precision over recall, and its means: AP and AR, as the packages lvis and
pycocotools have them.

What is remembered of detections after their image is done is a few numbers each, and only of those that count.

Method: docs/method.md#13-evaluation.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int32, Int64, UInt64
from numpy import ndarray

from opendet_jax.evaluate.greedy_matching import AREAS, THRESHOLDS, Outcome

PRUNED_AFTER = 2**21  # detections
RECALLS = np.linspace(0, 1, 101)
NOTHING = -1.0  # where there is no object to be found


@dataclass(frozen=True)
class Outcomes:
    """Detections whose class is known in their image, and what they are in each matching (greedy_matching.py)."""

    category: Int32[ndarray, " n"]  # its place in the truth
    score: Float64[ndarray, " n"]
    image: Int32[ndarray, " n"]  # its place in the truth
    rank: Int32[ndarray, " n"]  # in its image, 0 = best
    number: Int64[ndarray, " n"]  # in its file
    true: UInt64[ndarray, " n"]
    false: UInt64[ndarray, " n"]

    @classmethod
    def of_image(
        cls,
        image: int,
        outcome: Outcome,
        category: Int64[ndarray, " n"],
        score: Float64[ndarray, " n"],
        rank: Int64[ndarray, " n"],
        number: Int64[ndarray, " n"],
    ) -> "Outcomes":
        category, rank = category.astype(np.int32), rank.astype(np.int32)
        return cls(category, score, np.full(len(score), image, np.int32), rank, number, outcome.true, outcome.false)

    @classmethod
    def join(cls, parts: Sequence["Outcomes"]) -> "Outcomes":
        if not parts:
            small, large = np.zeros(0, np.int32), np.zeros(0, np.uint64)
            return cls(small, np.zeros(0), small, small, np.zeros(0, np.int64), large, large)
        return cls(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)))

    def __len__(self) -> int:
        return len(self.score)

    def __getitem__(self, chosen: ndarray) -> "Outcomes":
        return Outcomes(*(getattr(self, field.name)[chosen] for field in fields(self)))


class Uncounted(NamedTuple):
    """Detections whose class is unknown in their image, or is none (−1): they only take places."""

    category: Int32[ndarray, " n"]
    score: Float64[ndarray, " n"]
    number: Int64[ndarray, " n"]

    @classmethod
    def join(cls, parts: Sequence["Uncounted"]) -> "Uncounted":
        return cls(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    def where(self, chosen: Bool[ndarray, " n"]) -> "Uncounted":
        return Uncounted(*(column[chosen] for column in self))


class BestOfEachClass:
    """The `limit` best detections of each class over all images, however many are added; of equal scores the earliest.

    A detection that does not count takes a place too. Matching before choosing is as good as after it, as `match` says.
    """

    def __init__(self, classes: int, limit: int, pruned_after: int = PRUNED_AFTER):
        self._limit, self._pruned_after = limit, pruned_after
        self._known = [Outcomes.join([])]
        self._others = [Uncounted(np.zeros(0, np.int32), np.zeros(0), np.zeros(0, np.int64))]
        self._new = 0
        self._bar = np.full(classes, -np.inf)  # what a detection must at least score to be among the best

    def add(self, known: Outcomes, others: Uncounted) -> None:
        """The detections of one image."""
        known = known[known.score >= self._bar[known.category]]
        others = others.where(others.category >= 0)
        others = others.where(others.score >= self._bar[others.category])
        self._known.append(known)
        self._others.append(others)
        self._new += len(known) + len(others.score)
        if self._new > self._pruned_after:
            self._prune()

    def best(self) -> Outcomes:
        """Of the best those that count."""
        self._prune()
        return self._known[0]

    def _prune(self) -> None:
        known, self._known = Outcomes.join(self._known), []
        others, self._others = Uncounted.join(self._others), []
        kept = self._chosen(
            np.concatenate([known.category, others.category]),
            np.concatenate([known.score, others.score]),
            np.concatenate([known.number, others.number]),
        )
        self._known, self._others, self._new = [known[kept[: len(known)]]], [others.where(kept[len(known) :])], 0

    def _chosen(
        self, category: Int32[ndarray, " n"], score: Float64[ndarray, " n"], number: Int64[ndarray, " n"]
    ) -> Bool[ndarray, " n"]:
        """Which are among the best; raises the bar of each class that has enough of them."""
        by_class = np.argsort(category, kind="stable")
        ends = np.searchsorted(category[by_class], np.arange(len(self._bar)), side="right")
        kept = np.ones(len(score), np.bool_)
        for place, (start, end) in enumerate(zip(np.r_[0, ends[:-1]], ends, strict=True)):
            if end - start < self._limit:
                continue
            rows = by_class[start:end]
            scores = score[rows]
            bar = np.partition(scores, -self._limit)[-self._limit]
            equal = rows[scores == bar]
            room = self._limit - np.count_nonzero(scores > bar)
            kept[rows[scores < bar]] = False
            kept[equal[np.argsort(number[equal], kind="stable")[room:]]] = False
            self._bar[place] = bar
        return kept


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
