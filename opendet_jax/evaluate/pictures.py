"""Pictures of an evaluation: precision over recall, AP by frequency, names given; the images that went best and worst,
truth beside prediction; and the paper's figures 8 and 9.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float32, Float64
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy import ndarray
from PIL import Image

from opendet_jax.data.formats.records import Dataset, Record
from opendet_jax.data.images import open_record
from opendet_jax.drawing import contact_sheet, draw, side_by_side
from opendet_jax.evaluate.alignment import Alignment
from opendet_jax.evaluate.average_precision import NOTHING, RECALLS, Curves
from opendet_jax.evaluate.evaluator import Evaluation, ImageScore
from opendet_jax.evaluate.greedy_matching import AREAS, THRESHOLDS
from opendet_jax.evaluate.results import ScoredBoxes
from opendet_jax.evaluate.truth import SEEN_GROUPS, Truth
from opendet_jax.files import replacing

GROUP_NAMES = {"r": "rare", "c": "common", "f": "frequent", "u": "never seen in training"}
GROUP_COLOURS = {"r": "tab:red", "c": "tab:orange", "f": "tab:blue", "u": "tab:purple", "": "tab:gray"}
CONFUSED = 20  # classes, and names given, in the picture
LONGEST_NAME = 24  # characters
_ALL = list(AREAS).index("all")
EXAMPLES = 6
WIDTH = 2000  # pixels of a sheet
NOTHING_FOUND = ScoredBoxes(np.zeros(0, np.int64), np.zeros((0, 4)), np.zeros(0))
COLOURS = "viridis"
SIMILARITY = "name similarity"


def draw_precision_recall(truth: Truth, curves: Curves, title: str, picture: Path) -> None:
    """Means over classes: at each IoU, and at IoU 0.5 for each group of frequency."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    figure.suptitle(title)
    by_iou, by_group = figure.subplots(1, 2, sharey=True)
    colours = matplotlib.colormaps["viridis"].resampled(len(THRESHOLDS))
    for threshold, iou in enumerate(THRESHOLDS):
        _line(by_iou, _mean_curve(truth, curves, SEEN_GROUPS, threshold), f"{iou:.2f}", colours(threshold))
    by_iou.set(title="by IoU", xlabel="recall", ylabel="precision, mean over classes", ylim=(0, 1.02))
    _line(by_group, _mean_curve(truth, curves, SEEN_GROUPS, 0), "all", "black")
    for group, name in GROUP_NAMES.items():
        _line(by_group, _mean_curve(truth, curves, (group,), 0), name, GROUP_COLOURS[group])
    by_group.set(title="IoU 0.5, by how often a class occurs in training", xlabel="recall")
    for axis in (by_iou, by_group):
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8)
    _save(figure, picture)


def draw_ap_by_frequency(truth: Truth, curves: Curves, title: str, picture: Path) -> None:
    """The classes' APs over their numbers of objects to be found, and the groups' means."""
    per_class = curves.precision[:, _ALL].mean(axis=(1, 2))
    measured = per_class > NOTHING
    objects, groups = truth.wanted[:, _ALL], np.array(truth.groups)
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    figure.suptitle(title)
    by_objects, by_group = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    for group in np.unique(groups[measured]).tolist():
        own = measured & (groups == group)
        label = GROUP_NAMES.get(group, "no group")
        by_objects.scatter(objects[own], per_class[own], s=12, alpha=0.6, label=label, color=GROUP_COLOURS[group])
    by_objects.set(xscale="log", xlabel="objects of the class in this data set", ylabel="AP")
    if measured.any():
        by_objects.legend(fontsize=8)
    bars = {"all": measured & np.isin(groups, SEEN_GROUPS)}
    bars |= {name: measured & (groups == group) for group, name in GROUP_NAMES.items()}
    bars = {f"{name}\n{own.sum()} classes": per_class[own].mean() for name, own in bars.items() if own.any()}
    drawn = by_group.bar(list(bars), list(bars.values()), color="tab:gray")
    by_group.set_ylim(bottom=0)
    by_group.bar_label(drawn, [f"{100 * mean:.1f}" for mean in bars.values()])
    by_group.tick_params("x", labelsize=8)
    for axis in (by_objects, by_group):
        axis.grid(alpha=0.3)
    _save(figure, picture)


def draw_names(evaluation: Evaluation, picture: Path) -> None:
    """What found objects were called: the classes with the most wrong names, and the names given most often to them."""
    names = [category["name"] for category in evaluation.truth.categories]
    wrong: Counter[int] = Counter()
    for (true, name), times in evaluation.localisation.called.items():
        wrong[true] += times * (name not in evaluation.localisation.synonyms[true])
    rows = [true for true, times in wrong.most_common(CONFUSED) if times]
    given: Counter[str] = Counter()
    for (true, name), times in evaluation.localisation.called.items():
        if true in rows:
            given[name] += times
    columns = [name for name, _ in given.most_common(CONFUSED)]
    counts = np.array([[evaluation.localisation.called[true, name] for name in columns] for true in rows])
    counts = counts.reshape(len(rows), len(columns))
    found = evaluation.localisation.found[rows]
    figure = Figure(figsize=(4 + 0.45 * len(columns), 3 + 0.32 * len(rows)), layout="constrained")
    axis = figure.subplots()
    axis.set_title("names of boxes found (IoU ≥ 0.5), of the classes with the most wrong ones")
    if rows:
        axis.imshow(counts / found[:, None], cmap="Blues", vmin=0, vmax=1, aspect="auto")
        for row, column in np.argwhere(counts).tolist():
            ink = "white" if counts[row, column] > found[row] / 2 else "black"
            axis.text(column, row, str(counts[row, column]), ha="center", va="center", fontsize=7, color=ink)
    axis.set_xticks(range(len(columns)), [_short(name) for name in columns], rotation=60, ha="right", fontsize=8)
    labels = [f"{_short(names[true])} ({count})" for true, count in zip(rows, found.tolist(), strict=True)]
    axis.set_yticks(range(len(rows)), labels, fontsize=8)
    axis.set(xlabel="called", ylabel="class (boxes found)")
    _save(figure, picture)


def _short(name: str) -> str:
    name = name or "(no class)"
    name = name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"
    return name.replace("$", r"\$")  # matplotlib would typeset what stands between dollars


def _mean_curve(
    truth: Truth, curves: Curves, groups: tuple[str, ...], threshold: int
) -> Float64[ndarray, " recalls"] | None:
    precision = curves.precision[truth.classes_of(groups), _ALL, threshold]
    measured = precision[precision[:, 0] > NOTHING]
    return measured.mean(axis=0) if len(measured) else None


def _line(axis: Axes, precision: Float64[ndarray, " recalls"] | None, label: str, colour) -> None:
    if precision is not None:
        axis.plot(RECALLS, precision, label=f"{label}: {100 * precision.mean():.1f}", color=colour, lw=1.5)


def _save(figure: Figure, picture: Path) -> None:
    with replacing(picture) as part:
        figure.savefig(part, dpi=110, format="png")


def best_and_worst(scores: Sequence[ImageScore]) -> tuple[list[ImageScore], list[ImageScore]]:
    """Up to EXAMPLES each, the most telling first; of equal ones those with more objects. No image is in both."""
    count = min(EXAMPLES, len(scores) // 2) or min(EXAMPLES, len(scores))
    best = sorted(scores, key=lambda score: (-score.share, -score.objects, score.image_id))[:count]
    rest = [score for score in scores if score not in best]
    return best, sorted(rest, key=lambda score: (score.share, -score.objects, score.image_id))[:count]


def sheet(
    dataset: Dataset, found: Mapping[int, ScoredBoxes], scores: Sequence[ImageScore], class_names: Mapping[int, str]
) -> Image.Image:
    """Pairs of truth and prediction, of which as many boxes are drawn, the best, as the image has objects.

    `found` has an image's distinct boxes, nothing where there is none; `class_names` go by id. Raises ImageError.
    """
    records = {record.image_id: record for record in dataset.records}
    pairs = [_pair(records[score.image_id], found.get(score.image_id), score, class_names) for score in scores]
    return contact_sheet(pairs, columns=2, width=WIDTH)


def _pair(record: Record, found: ScoredBoxes | None, score: ImageScore, class_names: Mapping[int, str]) -> Image.Image:
    image = open_record(record)
    truth = draw(image, record.boxes, [names[0] for names in record.names])
    best = found[found.best_first()[: score.objects]] if found is not None else NOTHING_FOUND
    names = best.names or [class_names.get(category_id, "?") for category_id in best.category_ids.tolist()]
    corners = np.concatenate([best.boxes[:, :2], best.boxes[:, :2] + best.boxes[:, 2:]], axis=1)
    prediction = draw(image, corners, names, best.scores)
    title = f"the {len(best)} best: {100 * score.share:.0f} % of {score.objects} right"
    return side_by_side(truth, prediction, (f"truth, image {record.image_id}", title))


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
