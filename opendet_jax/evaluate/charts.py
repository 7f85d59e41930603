"""Pictures of an evaluation: precision over recall, AP by frequency, names given."""

from collections import Counter
from pathlib import Path

import matplotlib
import numpy as np
from jaxtyping import Float64
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy import ndarray

from opendet_jax.evaluate.curves import NOTHING, RECALLS, Curves
from opendet_jax.evaluate.evaluator import Evaluation
from opendet_jax.evaluate.matching import AREAS, THRESHOLDS
from opendet_jax.evaluate.truth_index import SEEN_GROUPS, Truth
from opendet_jax.files import replacing

GROUP_NAMES = {"r": "rare", "c": "common", "f": "frequent", "u": "never seen in training"}
GROUP_COLOURS = {"r": "tab:red", "c": "tab:orange", "f": "tab:blue", "u": "tab:purple", "": "tab:gray"}
CONFUSED = 20  # classes, and names given, in the picture
LONGEST_NAME = 24  # characters
_ALL = list(AREAS).index("all")


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
