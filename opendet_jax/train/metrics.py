"""Loss curves on disk: one json object a logged step, and the same numbers for TensorBoard."""

import json
from collections.abc import Mapping
from pathlib import Path

from tensorboardX import SummaryWriter


class MetricsLog:
    """Appends to `workdir/metrics.jsonl`. Lines after `last_step` (of a run that was cut off) are dropped first."""

    def __init__(self, workdir: Path, last_step: int):
        self.path = workdir / "metrics.jsonl"
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        kept = [line for line in lines if _step_of(line) <= last_step]
        if kept != lines:
            self.path.write_text("".join(line + "\n" for line in kept))
        self.tensorboard = SummaryWriter(str(workdir / "tensorboard"), purge_step=last_step + 1)

    def write(self, step: int, values: Mapping[str, int | float]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self.tensorboard.add_scalar(name, value, step)

    def close(self) -> None:
        self.tensorboard.close()


def _step_of(line: str) -> int | float:
    """The step of a line; a line cut off in the middle of writing counts as after everything."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")


def read_metrics(path: Path) -> list[dict[str, int | float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
