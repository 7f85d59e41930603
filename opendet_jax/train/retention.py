"""Which checkpoints of a run stay."""

from collections.abc import Callable
from pathlib import Path

from opendet_jax.config import TrainConfig
from opendet_jax.train.metrics import best_step
from opendet_jax.train.replay_file import replayed_steps


def retention(workdir: Path, config: TrainConfig) -> Callable[[list[int]], set[int]]:
    """Of rising steps: the newest, the best by `train.keep_best`, and those that a replay file refers to."""

    def kept(steps: list[int]) -> set[int]:
        best = best_step(workdir, config.keep_best, steps) if config.keep_best else None
        return {*steps[-config.keep_checkpoints :], *replayed_steps(workdir), *([] if best is None else [best])}

    return kept
