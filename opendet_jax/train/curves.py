"""The loss curves as a picture: one panel a term, one line a set (layer, encoder, denoising)."""

from collections import defaultdict
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from opendet_jax.train.metrics import read_metrics


def draw_curves(metrics: Path, picture: Path) -> None:
    """Reads metrics.jsonl and writes a png. Logarithmic in the loss, so that the fall of small terms shows too.

    A term that is never above zero has no panel.
    """
    rows = read_metrics(metrics)
    steps = [row["step"] for row in rows]
    panels: dict[str, list[str]] = defaultdict(list)
    for name in dict.fromkeys(name for row in rows for name in row):
        if name != "step" and any(row.get(name, 0) > 0 for row in rows):
            panels[name.split("/")[0]].append(name)
    if not panels:
        return
    columns = 3
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(5 * columns, 3.2 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (term, names) in zip(axes.flat, panels.items(), strict=False):
        colours = matplotlib.colormaps["viridis"].resampled(len(names))
        for index, name in enumerate(names):
            label = name.partition("/")[2] or None
            axis.plot(steps, [row.get(name, float("nan")) for row in rows], label=label, color=colours(index), lw=1)
        axis.set_title(term.replace("_", " "))
        axis.set_xlabel("step")
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
        if len(names) > 1:
            axis.legend(fontsize=5, ncols=3, title_fontsize=5)
    figure.savefig(picture, dpi=110)
