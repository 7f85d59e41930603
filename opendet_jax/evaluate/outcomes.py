"""What is remembered of detections after their image is done: a few numbers each, and only of those that count."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int32, Int64, UInt64
from numpy import ndarray

from opendet_jax.evaluate.matching import Outcome

PRUNED_AFTER = 2**21  # detections


@dataclass(frozen=True)
class Outcomes:
    """Detections whose class is known in their image, and what they are in each matching (matching.py)."""

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
