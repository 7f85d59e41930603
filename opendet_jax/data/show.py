"""A look at what training sees: augmented pictures in their padded batches, with boxes and names, on one sheet."""

from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from jaxtyping import Bool, UInt8
from numpy import ndarray
from PIL import Image
from tqdm import tqdm

from opendet_jax.config import Config
from opendet_jax.data.datasets import load_datasets
from opendet_jax.data.examples import ExampleBatch, Examples
from opendet_jax.drawing import contact_sheet, draw, titled
from opendet_jax.files import replacing

COLUMNS = 4
CELL = 480  # pixels: the width of a picture on the sheet
PADDING = ((225, 225, 225), (205, 205, 205))  # a checker that no photograph looks like
CHECKER = 16  # pixels
MOST_FREQUENT = 8  # names printed


def show(config: Config, out: Path, images: int, step: int, workdir: Path | None = None) -> str:
    """Draws the first `images` training images from a step on into `out` (PNG); returns what to print about them.

    The batches are the trainer's own, bit by bit: those of `train.seed`. Neither tokenizer nor text embeddings are
    needed. Drawn scenes are taken from `data.scenes_dir` or `workdir`; with neither they are drawn and thrown away.
    """
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
        ]
    )


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
