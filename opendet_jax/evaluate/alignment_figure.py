"""The paper's figures 8 and 9 of one model: query–text alignment of every matched query; with the similarity of its
name; and the product of both. The upper row takes the cosine as alignment, the lower one the score σ(S)."""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy import ndarray

from opendet_jax.evaluate.alignment import Alignment
from opendet_jax.files import replacing

COLOURS = "viridis"
SIMILARITY = "name similarity"


def draw_alignment(alignment: Alignment, title: str, picture: Path) -> None:
    """Writes a png. Queries whose generated name has no embedding are in the first column only."""
    summary = alignment.summary()
    figure = Figure(figsize=(17, 10.6), layout="constrained")
    figure.suptitle(f"{title}: {len(alignment.cosine)} matched queries, embeddings: {alignment.embeddings}")
    rows = (("cosine", alignment.cosine, "query_text_cosine"), ("score σ(S)", alignment.score, "query_text_score"))
    for row, (name, values, key) in enumerate(rows):
        label = f"query–text alignment, {name}"
        every = figure.add_subplot(2, 3, 3 * row + 1)
        every.scatter(np.arange(len(values)), values, s=_size(values), c="tab:blue", linewidths=0)
        _mark_mean(every, summary[key])
        every.set(xlabel="matched query", ylabel=label, title="query–text alignment (figure 8)")
        _with_similarity(figure, row, values, label, alignment.similarity, summary["name_similarity"])
    with replacing(picture) as part:
        figure.savefig(part, dpi=100, format="png")


def _with_similarity(
    figure: Figure,
    row: int,
    values: Float32[ndarray, " n"],
    label: str,
    similarity: Float32[ndarray, " n"],
    numbers: dict[str, Any],
) -> None:
    known = ~np.isnan(similarity)
    values, similarity = values[known], similarity[known]
    product = values * similarity
    style = {"s": _size(values), "c": product, "cmap": COLOURS, "linewidths": 0}
    plane = figure.add_subplot(2, 3, 3 * row + 2)
    plane.scatter(values, similarity, **style)
    _mark_mean(plane, numbers)
    plane.set(xlabel=label, ylabel=SIMILARITY, title="alignment and similarity (figure 9a)")
    space: Any = figure.add_subplot(2, 3, 3 * row + 3, projection="3d")
    space.scatter(values, similarity, product, **style)
    space.set(xlabel=label, ylabel=SIMILARITY, zlabel="product", title="with their product (figure 9b)")
    space.set_box_aspect(None, zoom=0.8)  # leaves room for the third label
    space.locator_params(nbins=5)
    space.tick_params(labelsize=8)
    for axis in (space.xaxis, space.yaxis, space.zaxis):
        axis.labelpad = 8


def _mark_mean(axes: Axes, numbers: dict[str, Any]) -> None:
    """The mean of what goes upwards, and one standard deviation around it."""
    axes.grid(alpha=0.3)
    if numbers["count"]:
        mean, std = numbers["mean"], numbers["std"]
        axes.axhline(mean, color="tab:red", lw=1.5, label=f"{mean:.3f} ± {std:.3f}")
        axes.axhspan(mean - std, mean + std, color="tab:red", alpha=0.15, lw=0, zorder=0)
        axes.legend(loc="lower right")


def _size(values: Float32[ndarray, " n"]) -> int:
    """Of a dot, in points²: smaller where there are many."""
    return 4 if len(values) > 2000 else 16
