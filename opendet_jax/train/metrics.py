"""What a run measures: one json object a logged step or evaluation, the same numbers for TensorBoard, and the loss
curves as a picture.
"""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib
from absl import logging
from matplotlib.figure import Figure

from opendet_jax.errors import InputError
from opendet_jax.files import replacing

METRICS, EVALUATIONS, TENSORBOARD, CURVES = "metrics.jsonl", "evaluations.jsonl", "tensorboard", "curves.png"
MEASURED = ("AP", "AP50", "agnostic_AP", "naming_accuracy")  # of evaluations, those that have a curve

QUEUE = 10_000  # numbers: more than a line has, so that adding them never waits

Row = dict[str, int | float]


class LogError(InputError):
    """A log that cannot be written."""


class MetricsLog:
    """Appends to `workdir/metrics.jsonl` and `workdir/evaluations.jsonl`.

    Lines after `last_step` (of a run that was cut off) are dropped first. Raises LogError, here and when it writes.
    """

    def __init__(self, workdir: Path, last_step: int):
        from tensorboardX import SummaryWriter  # takes PyTorch along, wherever that is installed

        self._metrics, self._evaluations = workdir / METRICS, workdir / EVALUATIONS
        self._events = workdir / TENSORBOARD
        try:
            for path in (self._metrics, self._evaluations):
                _keep_lines(path, lambda step: step <= last_step)
            self._tensorboard = SummaryWriter(str(self._events), purge_step=last_step + 1, max_queue=QUEUE)
        except OSError as error:
            raise LogError(f"{error.filename or workdir}: cannot be written: {error.strerror}") from error

    def write(self, step: int, values: Mapping[str, int | float]) -> None:
        """The loss terms of a step. One that is not finite (its update was skipped) is left out."""
        self._append(self._metrics, step, {name: value for name, value in values.items() if math.isfinite(value)})

    def evaluated(self, step: int, metrics: Mapping[str, Any]) -> None:
        """The numbers of an evaluation, in place of those of an earlier one of the same step."""
        numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float) and name != "step"}
        try:
            _keep_lines(self._evaluations, lambda earlier: earlier != step)
        except OSError as error:
            raise LogError(f"{self._evaluations}: cannot be written: {error.strerror}") from error
        self._append(self._evaluations, step, numbers, "eval/")

    def _append(self, path: Path, step: int, values: Mapping[str, int | float], prefix: str = "") -> None:
        if not path.exists() or not self._events.is_dir():
            gone = self._events if path.exists() else path
            raise LogError(f"{gone}: is gone; something removed it during training")
        if not self._tensorboard_lives():
            raise LogError(f"{self._events}: could not be written; is the disk full?")
        try:
            with path.open("a") as file:
                file.write(json.dumps({"step": step, **values}, allow_nan=False) + "\n")
            for name, value in values.items():
                self._tensorboard.add_scalar(prefix + name, value, step)
        except OSError as error:
            raise LogError(f"{path}: cannot be written: {error.strerror}") from error

    def _tensorboard_lives(self) -> bool:
        """Its thread ends without a word at the first error, and then nobody empties its queue."""
        writer: Any = self._tensorboard.file_writer
        return writer is not None and writer.event_writer._worker.is_alive()

    def close(self) -> None:
        """Reports what cannot be written any more, and raises nothing: it must not hide what ended the run."""
        writer: Any = self._tensorboard.file_writer
        if writer is not None:
            # What its thread has not read when it ends, nobody reads. Python would wait for that at its own end.
            writer.event_writer._event_queue.cancel_join_thread()
        try:
            self._tensorboard.close()
        except OSError as error:
            logging.warning("%s: its last lines cannot be written: %s", self._events, error.strerror)


def _keep_lines(path: Path, kept: Callable[[int | float], bool]) -> None:
    """Leaves the lines of steps that are `kept`; makes the file where there is none."""
    lines = path.read_text().splitlines() if path.exists() else []
    good = [line for line in lines if kept(_step_of(line))]
    if good != lines or not path.exists():
        with replacing(path) as part:
            part.write_text("".join(line + "\n" for line in good))


def _step_of(line: str) -> int | float:
    """The step of a line; a line cut off in the middle of writing counts as after everything."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def read_metrics(path: Path) -> list[Row]:
    """Its lines; none where there is no such file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def is_evaluated(workdir: Path, step: int) -> bool:
    path = workdir / EVALUATIONS
    return path.is_file() and any(_step_of(line) == step for line in path.read_text().splitlines())


def best_step(workdir: Path, metric: str, steps: list[int]) -> int | None:
    """Of these steps the one whose evaluation has the largest `metric`, the latest of several; None: none has any."""
    rows = read_metrics(workdir / EVALUATIONS)
    scores = [(row[metric], row["step"]) for row in rows if metric in row and row["step"] in steps]
    return int(max(scores)[1]) if scores else None


def draw_curves(workdir: Path) -> None:
    """Reads metrics.jsonl and evaluations.jsonl, and writes curves.png: a panel a term of the loss, learning rates, AP.

    Logarithmic in the loss, so that the fall of small terms shows too. A term that is never above zero has no panel.
    """
    rows, panels = read_metrics(workdir / METRICS), defaultdict[str, list[str]](list)
    for name in dict.fromkeys(("total", *(name for row in rows for name in row))):
        if name != "step" and any(row.get(name, 0) > 0 for row in rows):
            panels[name.split("/")[0]].append(name)
    evaluations = [
        {name: value if name == "step" else 100 * value for name, value in row.items()}
        for row in read_metrics(workdir / EVALUATIONS)
    ]
    measured = [name for name in MEASURED if any(name in row for row in evaluations)]
    if not panels:
        return
    count = len(panels) + bool(measured)
    columns = min(3, count)
    figure = Figure(figsize=(5 * columns, 3.2 * -(-count // columns)), layout="constrained")
    axes = figure.subplots(-(-count // columns), columns, squeeze=False).flat
    for axis, (term, names) in zip(axes, panels.items(), strict=False):
        _draw_panel(axis, rows, term, names)
        axis.set_yscale("log")
    if measured:
        _draw_panel(axes[len(panels)], evaluations, "evaluation, percent", measured)
        axes[len(panels)].set_ylim(bottom=0)
    for axis in axes[count:]:
        axis.remove()
    with replacing(workdir / CURVES) as part:
        figure.savefig(part, dpi=110, format="png")


def _draw_panel(axis: Any, rows: list[Row], title: str, names: list[str]) -> None:
    colours = matplotlib.colormaps["viridis"].resampled(len(names) + 1)  # its last one is too light for a line
    for index, name in enumerate(names):
        points = [(row["step"], row[name]) for row in rows if name in row]
        label = name.partition("/")[2] or (name if len(names) > 1 else None)
        marker = "." if len(points) < 20 else None  # so that a single one is seen
        axis.plot(*zip(*points, strict=True), label=label, color=colours(index), lw=1, marker=marker)
    axis.set_title(title.replace("_", " "))
    axis.set_xlabel("step")
    axis.grid(alpha=0.3)
    if len(names) > 1:
        axis.legend(fontsize=6 if len(names) < 6 else 5, ncols=-(-len(names) // 5))
