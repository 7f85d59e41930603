"""What is in a data set: numbers, a page of histograms, lines to print."""

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy import ndarray

from opendet_jax.data.records import Dataset
from opendet_jax.files import replacing

LISTED = 30  # names
LONGEST = 40  # characters of a name in the picture
COLOUR, ACCENT = "#3b6ea5", "#444444"
SMALL, MEDIUM = 32, 96  # pixels: where COCO's and LVIS's area groups end


def count(dataset: Dataset) -> dict[str, Any]:
    """Images, boxes and names, as summary.json has them."""
    names = _name_counts(dataset)
    each = _boxes_per_image(dataset)
    return {
        "images": len(dataset),
        "images_without_boxes": int((each == 0).sum()),
        "boxes": int(each.sum()),
        "most_boxes_of_an_image": int(each.max(initial=0)),
        "names": len(names),
        "names_of_one_box": sum(found == 1 for found in names.values()),
        "categories": len(dataset.categories),
        "box_side_percentiles": _percentiles(_box_sides(dataset)),
        "most_frequent_names": [[name, found] for name, found in names.most_common(LISTED)],
    }


def describe(summary: Mapping[str, Any]) -> str:
    """The lines that `prepare` prints."""
    lines = [
        f"{summary['images']:,} images ({summary['images_without_boxes']:,} without boxes), "
        f"{summary['boxes']:,} boxes (at most {summary['most_boxes_of_an_image']:,} an image), "
        f"{summary['names']:,} names, {summary['shards']} shards, {summary['bytes'] / 2**20:,.1f} MiB",
    ]
    for kind, problem in summary["problems"].items():
        lines.append(f"  {problem['count']:,} × {kind}: {'; '.join(problem['examples'])}")
    left_out: Sequence[Mapping[str, Any]] = summary["left_out"]
    if left_out:
        lines.append(f"  {len(left_out):,} × image left out: {'; '.join(entry['reason'] for entry in left_out[:3])}")
    return "\n".join(lines)


def draw(dataset: Dataset, title: str, picture: Path) -> None:
    """Names and box sizes on a page (PNG)."""
    counts, each = _name_counts(dataset), _boxes_per_image(dataset)
    figure = Figure(figsize=(12, 9), layout="constrained")
    panels = figure.subplot_mosaic([["names", "ranks"], ["names", "sides"], ["names", "each"]])
    figure.suptitle(f"{title}: {len(dataset):,} images, {each.sum():,} boxes, {len(counts):,} names", parse_math=False)
    _frequent_names(panels["names"], counts)
    _ranks(panels["ranks"], counts)
    _sides(panels["sides"], _box_sides(dataset))
    _per_image(panels["each"], each)
    with replacing(picture) as part, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # names may be in any script
        figure.savefig(part, dpi=110, format="png", metadata={"Software": None})


def _frequent_names(axes: Axes, counts: Counter[str]) -> None:
    shown = counts.most_common(LISTED)
    labels = [name if len(name) <= LONGEST else name[: LONGEST - 1] + "…" for name, _ in shown]
    bars = axes.barh(range(len(shown)), [found for _, found in shown], color=COLOUR)
    axes.bar_label(bars, fmt="{:,.0f}", padding=3, fontsize=7)
    axes.set_yticks(range(len(shown)), labels, parse_math=False, fontsize=8)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.margins(x=0.12)
    axes.set(title="most frequent names", xlabel="boxes")
    axes.spines[["top", "right"]].set_visible(False)


def _ranks(axes: Axes, counts: Counter[str]) -> None:
    axes.set(title="all names by rank", xlabel="rank", ylabel="boxes")
    axes.grid(alpha=0.3)
    if counts:  # a logarithmic axis needs something on it
        axes.loglog(range(1, len(counts) + 1), list(counts.values()), color=COLOUR)


def _sides(axes: Axes, sides: Float[ndarray, "boxes"]) -> None:
    edges = np.geomspace(min(1.0, sides.min(initial=1.0)), max(2.0, sides.max(initial=2.0)), 60)
    axes.hist(sides, edges.tolist(), color=COLOUR)
    limits = (edges[0], SMALL, MEDIUM, max(edges[-1], 2 * MEDIUM))
    for low, high, name in zip(limits, limits[1:], ("small", "medium", "large"), strict=False):
        middle = np.sqrt(low * high)
        axes.annotate(name, (middle, 1), xycoords=("data", "axes fraction"), fontsize=8, ha="center", va="bottom")
    for side in (SMALL, MEDIUM):
        axes.axvline(side, color=ACCENT, lw=1, ls="--")
    axes.set(xlabel="box sizes: square root of the area, in pixels", ylabel="boxes", xscale="log")
    axes.grid(alpha=0.3)


def _per_image(axes: Axes, each: Int[ndarray, "images"]) -> None:
    most = int(each.max(initial=0))
    step = max(1, most // 60)
    axes.hist(each, np.arange(-0.5, most + step + 0.5, step).tolist(), color=COLOUR, log=len(each) > 0)
    axes.set(xlabel="boxes of an image", ylabel="images")
    axes.grid(alpha=0.3)
    if len(each):
        axes.set_ylim(bottom=0.7)  # below a single image


def _name_counts(dataset: Dataset) -> Counter[str]:
    """Boxes of each name, the most frequent first and equally frequent ones in alphabetical order."""
    found = Counter(name for record in dataset.records for names in record.names for name in names)
    return Counter(dict(sorted(found.items(), key=lambda item: (-item[1], item[0]))))


def _boxes_per_image(dataset: Dataset) -> Int[ndarray, "images"]:
    return np.array([len(record.boxes) for record in dataset.records], np.int64)


def _box_sides(dataset: Dataset) -> Float[ndarray, "boxes"]:
    """Square roots of the areas, in pixels."""
    parts = [np.sqrt(np.prod(record.boxes[:, 2:] - record.boxes[:, :2], axis=1)) for record in dataset.records]
    return np.concatenate([np.zeros(0, np.float32), *parts])


def _percentiles(values: Float[ndarray, "boxes"]) -> dict[str, float]:
    if not len(values):
        return {}
    wanted = (1, 25, 50, 75, 99)
    return {str(p): round(float(v), 2) for p, v in zip(wanted, np.percentile(values, wanted), strict=True)}
