"""From a photograph to its place in a batch: flip, random crop, resize, and a bucket's padding.

Geometry is drawn first, from sizes and boxes alone, and applied after. Buckets are the few padded sizes (H, W) that
batches may have, since XLA compiles once per shape.

Method: docs/method.md#1-image.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float32, UInt8
from numpy import ndarray
from PIL import Image

from opendet_jax.config import DataConfig
from opendet_jax.data.formats.records import Record

Size = tuple[int, int]  # height, width
CROP_ATTEMPTS = 10  # windows tried until one holds an object


def fit(size: Size, bucket: Size) -> Size:
    """`size`, made smaller at its aspect ratio where it does not fit into the bucket."""
    shrink = min(1.0, bucket[0] / size[0], bucket[1] / size[1])
    height, width = (min(b, max(1, round(s * shrink))) for s, b in zip(size, bucket, strict=True))
    return height, width


def choose(size: Size, buckets: Sequence[Size]) -> int:
    """Index of the bucket in which an image of this size needs the least shrinking and then the least padding."""

    def cost(i: int) -> tuple[float, int, int]:
        height, width = buckets[i]
        return -min(1.0, height / size[0], width / size[1]), height * width, i

    return min(range(len(buckets)), key=cost)


@dataclass(frozen=True)
class Geometry:
    """What happens to a picture: this window of it is resized, then mirrored or not."""

    window: tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels of the original
    size: Size  # height, width of the result
    flip: bool = False


def resized(size: tuple[int | float, int | float], short_side: int, max_long_side: int) -> Size:
    """Height and width after bringing the shorter side to `short_side` and the longer to at most `max_long_side`."""
    scale = min(short_side / min(size), max_long_side / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def evaluation_geometry(height: int, width: int, config: DataConfig) -> Geometry:
    size = resized((height, width), config.eval_short_side, config.max_long_side)
    return Geometry((0.0, 0.0, float(width), float(height)), size)


def training_geometry(rng: np.random.Generator, record: Record, config: DataConfig) -> Geometry:
    """Draw flip, crop and size for a record. A record with objects keeps at least one.

    A window that holds no part of any object is drawn again, at last the whole picture is taken.
    """
    flip = bool(rng.random() < config.flip_probability)
    window = (0.0, 0.0, float(record.width), float(record.height))
    if rng.random() < config.crop_probability:
        for _ in range(CROP_ATTEMPTS):
            drawn = _crop_window(rng, record, config)
            if _inside(record.boxes, drawn).any():
                window = drawn
                break
    x0, y0, x1, y1 = window
    short_side = int(rng.choice(config.train_short_sides))
    return Geometry(window, resized((y1 - y0, x1 - x0), short_side, config.max_long_side), flip)


def _crop_window(rng: np.random.Generator, record: Record, config: DataConfig) -> tuple[float, float, float, float]:
    """A window with sides in `crop_range`, of the picture resized to one of `crop_short_sides`, in original pixels."""
    scale = int(rng.choice(config.crop_short_sides)) / min(record.width, record.height)
    low, high = config.crop_range
    spans = []
    for side in (record.width, record.height):
        available = max(1, round(side * scale))
        length = int(rng.integers(min(low, available), min(high, available) + 1))
        start = int(rng.integers(available - length + 1))
        spans.append((start * side / available, (start + length) * side / available))
    (x0, x1), (y0, y1) = spans
    return x0, y0, x1, y1


def _clipped(boxes: Float[ndarray, "n 4"], window: tuple[float, float, float, float]) -> Float[ndarray, "n 4"]:
    x0, y0, x1, y1 = window
    return np.clip(boxes.astype(np.float64), (x0, y0, x0, y0), (x1, y1, x1, y1))


def _inside(boxes: Float[ndarray, "n 4"], window: tuple[float, float, float, float]) -> Bool[ndarray, "n"]:
    """Which boxes still have an area once clipped to the window."""
    clipped = _clipped(boxes, window)
    return (clipped[:, 2] > clipped[:, 0]) & (clipped[:, 3] > clipped[:, 1])


def transform_boxes(
    boxes: Float[ndarray, "n 4"], geometry: Geometry
) -> tuple[Float32[ndarray, "m 4"], Bool[ndarray, "n"]]:
    """Corner boxes in pixels → (cx, cy, w, h) normalised by the window, of those that are kept, and which those are."""
    kept = _inside(boxes, geometry.window)
    x0, y0, x1, y1 = geometry.window
    corners = _clipped(boxes[kept], geometry.window) - (x0, y0, x0, y0)
    corners /= (x1 - x0, y1 - y0, x1 - x0, y1 - y0)
    if geometry.flip:
        corners = np.stack([1 - corners[:, 2], corners[:, 1], 1 - corners[:, 0], corners[:, 3]], 1)
    low, high = corners[:, :2], corners[:, 2:]
    return np.concatenate([(low + high) / 2, high - low], 1).astype(np.float32), kept


def resample(image: Image.Image, geometry: Geometry) -> Image.Image:
    """Bilinear with antialiasing, as Pillow does it; an RGB picture stays Pillow's until it lies in its batch."""
    height, width = geometry.size
    image = image.resize((width, height), Image.Resampling.BILINEAR, box=geometry.window)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if geometry.flip else image


def transform_pixels(pixels: UInt8[ndarray, "h w 3"], geometry: Geometry) -> UInt8[ndarray, "h2 w2 3"]:
    """`resample` of an array."""
    return np.asarray(resample(Image.fromarray(pixels), geometry))


def place(
    picture: UInt8[ndarray, "h w 3"] | Image.Image, pixels: UInt8[ndarray, "H W 3"], mask: Bool[ndarray, "H W"]
) -> None:
    """Write a picture into the upper left of its place in a batch, and where it is into the mask."""
    content = np.asarray(picture)
    height, width, _ = content.shape
    pixels[:height, :width], mask[:height, :width] = content, True


def pad(pixels: UInt8[ndarray, "h w 3"], bucket: Size) -> tuple[UInt8[ndarray, "h2 w2 3"], Bool[ndarray, "h2 w2"]]:
    """The picture in the upper left of a black bucket, and the mask that is True on it."""
    padded, mask = np.zeros((*bucket, 3), np.uint8), np.zeros(bucket, np.bool_)
    place(pixels, padded, mask)
    return padded, mask
