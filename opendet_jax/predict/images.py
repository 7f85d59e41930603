"""Whatever a caller calls an image, as an RGB array."""

import os
from pathlib import Path
from typing import TypeAlias

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from opendet_jax.data.images import read_image, to_rgb

ImageLike: TypeAlias = np.ndarray | str | os.PathLike | Image.Image


def load_image(image: ImageLike) -> UInt8[np.ndarray, "H W 3"]:
    """RGB of an array (H, W, 3) or (H, W) of uint8 (RGB or grey), a file, or a PIL image.

    Files and PIL images are turned upright as their EXIF says, and what is transparent becomes white.

    Raises:
        TypeError: something else, or an array of another dtype.
        ValueError: an array of another shape, an empty image, or (as ImageError, naming it) a file that is missing or
            no picture.
    """
    if isinstance(image, np.ndarray):
        return _from_array(image)
    if isinstance(image, str | os.PathLike):
        return read_image(Path(image))
    if not isinstance(image, Image.Image):
        raise TypeError(f"an image is an array, a path or a PIL image, not {type(image).__name__}")
    if 0 in image.size:
        raise ValueError(f"the image is empty: {image.width}×{image.height}")
    return to_rgb(image)


def _from_array(pixels: np.ndarray) -> UInt8[np.ndarray, "H W 3"]:
    if pixels.dtype != np.uint8:
        raise TypeError(f"an image array has dtype uint8 (0…255), not {pixels.dtype}")
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] != 3):
        raise ValueError(f"an image array has shape (H, W, 3) or (H, W), not {pixels.shape}; several go in a list")
    if pixels.size == 0:
        raise ValueError(f"the image is empty: shape {pixels.shape}")
    return pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, axis=2)
