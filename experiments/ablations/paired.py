"""Paired seeds: differences of two arms, their exact sign-flip p, their exact bootstrap interval, and a verdict.

Nothing here is random: with six pairs all 2⁶ signs and all 6⁶ resamples are looked at.
"""

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

LEVEL = 0.05
MOST = 7  # pairs, of which all resamples can be looked at

Verdict = Literal["holds", "reversed", "no difference", "undecided", "too few runs"]


class Comparison(NamedTuple):
    seeds: tuple[int, ...]
    differences: Float64[ndarray, " n"]
    mean: float
    low: float  # of the 95 % bootstrap interval of the mean
    high: float
    p: float  # two-sided
    verdict: Verdict


def sign_flip_p(differences: Sequence[float] | Float64[ndarray, " n"]) -> float:
    """The share of the 2ⁿ signs that give a mean at least as far from 0: two-sided, exact, 2/2ⁿ at the least."""
    values = _checked(differences)
    signs = np.array(list(product((1.0, -1.0), repeat=len(values))))
    means = np.abs(signs @ values)
    return float(np.mean(means >= means[0] * (1 - 1e-12)))


def bootstrap_interval(differences: Sequence[float] | Float64[ndarray, " n"]) -> tuple[float, float]:
    """Percentiles 2.5 and 97.5 of the means of all nⁿ resamples of n numbers."""
    values = _checked(differences)
    means = np.array([0.0])
    for _ in values:
        means = (means[:, None] + values).ravel()
    low, high = np.quantile(means / len(values), (LEVEL / 2, 1 - LEVEL / 2))
    return float(low), float(high)


def _checked(differences: Sequence[float] | Float64[ndarray, " n"]) -> Float64[ndarray, " n"]:
    values = np.asarray(differences, np.float64)
    if not 1 <= len(values) <= MOST or not np.isfinite(values).all():
        raise ValueError(f"1 to {MOST} finite differences are needed, not {values.tolist()}")
    return values


def compare(first: Mapping[int, float], second: Mapping[int, float], smallest: float, pairs: int) -> Comparison | None:
    """`first` − `second` over the seeds that both have, None where there is none.

    The order "first above second"
      holds          where p ≤ 0.05 and the whole interval is above 0,
      is reversed    where p ≤ 0.05 and the whole interval is below 0,
    and otherwise there is
      no difference  where the whole interval lies within ± `smallest`, the smallest effect of interest;
    what is none of these is undecided. With fewer than `pairs` pairs there is no verdict yet.
    """
    seeds = tuple(sorted(first.keys() & second.keys()))
    if not seeds:
        return None
    differences = np.array([first[seed] - second[seed] for seed in seeds])
    p, (low, high) = sign_flip_p(differences), bootstrap_interval(differences)
    return Comparison(
        seeds, differences, float(differences.mean()), low, high, p, _verdict(len(seeds), p, low, high, smallest, pairs)
    )


def _verdict(count: int, p: float, low: float, high: float, smallest: float, pairs: int) -> Verdict:
    if count < pairs:
        return "too few runs"
    if p <= LEVEL and low > 0:
        return "holds"
    if p <= LEVEL and high < 0:
        return "reversed"
    return "no difference" if -smallest < low and high < smallest else "undecided"
