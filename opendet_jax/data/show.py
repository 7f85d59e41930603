"""A look at a data set: its numbers and histograms; what training sees of it, augmented and padded, on one sheet."""

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Bool, Float, Int, UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy import ndarray
from PIL import Image
from tqdm import tqdm

from opendet_jax.config import Config
from opendet_jax.data.datasets import load_datasets
from opendet_jax.data.examples import ExampleBatch, Examples
from opendet_jax.data.formats.records import Dataset, Record
from opendet_jax.data.tokenizer import Tokenizer, TokenizerError, load_tokenizer, lost_names
from opendet_jax.drawing import contact_sheet, draw, titled
from opendet_jax.errors import InputError
from opendet_jax.files import replacing, try_folder

LISTED = 30  # names
LONGEST = 40  # characters of a name in the picture
COLOUR, ACCENT = "#3b6ea5", "#444444"
SMALL, MEDIUM = 32, 96  # pixels: where COCO's and LVIS's area groups end
COLUMNS = 4
CELL = 480  # pixels: the width of a picture on the sheet
PADDING = ((225, 225, 225), (205, 205, 205))  # a checker that no photograph looks like
CHECKER = 16  # pixels
MOST_FREQUENT = 8  # names printed


def show(config: Config, out: Path, images: int, step: int, workdir: Path | None = None) -> str:
    """Draws the first `images` training images from a step on into `out` (PNG); returns what to print about them.

    The batches are the trainer's own, bit by bit: those of `train.seed`. Text embeddings are not needed; names are
    compared with what the tokenizer makes of them, where it is on this machine. Drawn scenes are taken from
    `data.scenes_dir` or `workdir`; with neither they are drawn and thrown away. Raises InputError where `out` cannot be
    written, before anything else.
    """
    try:
        try_folder(out.parent)
    except OSError as error:
        raise InputError(f"{out}: cannot be written: {error.strerror}") from error
    if out.is_dir():
        raise InputError(f"{out}: is a folder; name a file in it")
    with TemporaryDirectory() as temporary:
        mixture, _ = load_datasets(config, workdir or temporary)
        examples = Examples(mixture, config.data, config.train.seed)
        size = config.data.batch_size
        pictures, lines, names = [], [mixture.describe()], Counter[str]()
        steps = range(step, step + -(-images // size))
        for number in tqdm(steps, desc="batches", unit="batch", leave=False, disable=len(steps) < 4):
            batch = examples[number]
            height, width = batch.mask.shape[1:]
            lines.append(f"step {number}: {size} images padded to {height}×{width}, {batch.valid.sum()} objects")
            for i in range(min(size, images - len(pictures))):
                pictures.append(_picture(batch, i, number))
                names.update(batch.names[i])
    with replacing(out) as part:
        contact_sheet(pictures, COLUMNS, COLUMNS * (CELL + 8) + 8).save(part, format="PNG")
    common = ", ".join(f"{name} × {count}" for name, count in names.most_common(MOST_FREQUENT))
    return "\n".join(
        [
            *lines,
            f"{out}: {len(pictures)} images, {names.total()} objects, {len(names)} names",
            f"most frequent: {common}",
            *_lost(mixture.records, config),
        ]
    )


def _lost(records: Sequence[Record], config: Config) -> list[str]:
    """Which names cannot be learnt, in lines; none where all can. Where that cannot be said, a warning says why."""
    try:
        tokenizer = load_tokenizer(config.data.tokenizer, config.model.t5.vocab_size, download=False)
    except TokenizerError as error:
        logging.warning("whether the names can be learnt is not known: %s", error)
        return []
    lost = lost_names(records, tokenizer, config.data.max_name_tokens)
    return [lost.describe(config.data.tokenizer, config.data.max_name_tokens)] if lost.names else []


def describe_names(records: Sequence[Record], tokenizer: Tokenizer, name: str, max_tokens: int) -> str:
    """Lines: which names cannot be learnt with a tokenizer of this `name`, or that all can."""
    lost = lost_names(records, tokenizer, max_tokens)
    if lost.names:
        return lost.describe(name, max_tokens)
    return f"all {lost.all_names:,} names can be written in {max_tokens} tokens of {name!r}"


def _picture(batch: ExampleBatch, i: int, step: int) -> Image.Image:
    mask, pixels, valid = batch.mask[i], batch.pixels[i], batch.valid[i]
    height, width = int(mask[:, 0].sum()), int(mask[0].sum())
    centre, size = np.split(batch.boxes[i][valid], 2, axis=-1)
    corners = np.concatenate([centre - size / 2, centre + size / 2], -1) * (width, height, width, height)
    padded = Image.fromarray(_with_visible_padding(pixels, mask))
    scale = CELL / padded.width
    small = padded.resize((CELL, round(padded.height * scale)), Image.Resampling.LANCZOS)
    title = f"step {step}.{i}  {batch.paths[i].name}  {width}×{height}"
    return titled(draw(small, corners * scale, batch.names[i]), title)


def _with_visible_padding(pixels: UInt8[ndarray, "H W 3"], mask: Bool[ndarray, "H W"]) -> UInt8[ndarray, "H W 3"]:
    rows, columns = np.indices(mask.shape) // CHECKER
    checker = np.array(PADDING, np.uint8)[(rows + columns) % 2]
    return np.where(mask[..., None], pixels, checker)


def summarise(dataset: Dataset) -> dict[str, Any]:
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


def draw_summary(dataset: Dataset, title: str, picture: Path) -> None:
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
