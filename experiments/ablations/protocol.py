"""What is compared with what: the README's orders, mechanisms and controls, with the smallest effects of interest."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

from experiments.ablations.arms import SEEDS, STEPS

SHARE = 0.1  # of the AP of `full`: the smallest effect of interest; the paper's smallest of these orders is 2.8 of 27.0
WINDOW = 50  # steps
PAIRS = len(SEEDS)

Result = dict[str, Any]


class Claim(NamedTuple):
    """That the value of `first` is above that of `second`."""

    title: str
    paper: str
    first: str
    second: str
    value: Callable[[Result], float | None]  # None: the run has none
    smallest: float
    factor: float = 1.0  # of what is shown


def final(name: str) -> Callable[[Result], float | None]:
    """A metric of the evaluation after the last step."""
    return lambda result: result["curve"][-1].get(name)


def measured(name: str) -> Callable[[Result], float | None]:
    return lambda result: result.get(name)


def smallest_effect(full: Mapping[int, Result]) -> float:
    """δ of AP, from the runs of `full` that are there."""
    return SHARE * float(np.mean([result["curve"][-1]["AP"] for result in full.values()])) if full else 0.0


def naming_level(full: Mapping[int, Result]) -> float:
    """The mean naming loss of the window that ends at half of the steps, over the runs of `full` that are there."""
    return float(np.mean([windows(result)[STEPS // 2 - WINDOW] for result in full.values()])) if full else 0.0


def windows(result: Result) -> Float64[ndarray, " n"]:
    """Means of the naming loss over steps 1 to `WINDOW`, 2 to `WINDOW` + 1, …"""
    return np.convolve(np.asarray(result["naming"], np.float64), np.ones(WINDOW) / WINDOW, mode="valid")


def steps_to(level: float) -> Callable[[Result], float]:
    """The last step of the first window whose naming loss is not above the level; the last of all where none is."""

    def steps(result: Result) -> float:
        reached = np.flatnonzero(windows(result) <= level)
        return float(reached[0] + WINDOW if len(reached) else STEPS)

    return steps


def orders(delta: float) -> tuple[Claim, ...]:
    def order(title: str, paper: str, first: str, second: str) -> Claim:
        return Claim(title, paper, first, second, final("AP"), delta, 100)

    return (
        order("LLM trained above frozen", "+7.0", "full", "frozen_llm"),
        order("Open-Det above GenerateU, LLM frozen", "+7.7", "frozen_llm", "generateu_frozen_llm"),
        order("Open-Det above GenerateU, LLM trained", "+7.4 (+1.6 after 149 epochs)", "full", "generateu"),
        order("object detector, taken from the whole", "+3.5 as below", "full", "no_object_detector"),
        order("object detector, added to GenerateU", "+3.5", "ladder_detector", "generateu"),
        order("distiller, taken from the whole", "+2.8 as below", "full", "no_distiller"),
        order("distiller, added to GenerateU, detector and aligner", "+2.8", "ladder_distiller", "ladder_aligner"),
    )


def mechanisms(level: float) -> tuple[Claim, ...]:
    correlation, never_seen = measured("score_iou_rank_correlation"), measured("named_right_never_seen")
    steps = "LoRA head: steps more that a full head takes to one naming loss"
    aligned = "aligner: cosine of query and text"
    return (
        Claim("Joint Loss: rank correlation of score and IoU", "A.4", "full", "no_joint_loss", correlation, 0.05),
        Claim(steps, "A.2", "no_lora_head", "full", steps_to(level), 0.05 * STEPS),
        Claim("text denoising: never-seen names right, %", "3.5", "full", "no_text_denoising", never_seen, 0.05, 100),
        Claim(aligned, "3.3, 4.3", "full", "no_aligner", measured("query_text_cosine"), 0.05),
    )


def controls(delta: float) -> tuple[Claim, ...]:
    never_seen, noise = measured("named_right_never_seen"), "distiller fed with noise: AP"
    return (
        Claim("texts shuffled: never-seen names right, %", "a loss", "full", "shuffled_texts", never_seen, 0.05, 100),
        Claim("texts shuffled: AP", "–", "full", "shuffled_texts", final("AP"), delta, 100),
        Claim(f"{noise} above none", "no gain", "noise_fed_distiller", "no_distiller", final("AP"), delta, 100),
        Claim(f"{noise} below that of features", "–", "full", "noise_fed_distiller", final("AP"), delta, 100),
    )
