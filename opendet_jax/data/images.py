"""Image files to RGB arrays, whatever they hold."""

import struct
import zlib
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray
from PIL import Image, ImageOps, UnidentifiedImageError

from opendet_jax.data.records import Record
from opendet_jax.errors import InputError


class ImageError(InputError):
    """A file that is missing, damaged, or not the picture its json describes: the message names it."""


def read_image(path: Path) -> UInt8[ndarray, "h w 3"]:
    """Decode a file to RGB, turned upright as its EXIF says. Transparent parts become white; 16 bits become 8.

    Raises ImageError.
    """
    try:
        with Image.open(path) as file:
            file.load()
            return to_rgb(file)
    except FileNotFoundError as error:
        raise ImageError(f"{path}: no such image") from error
    except UnidentifiedImageError as error:
        raise ImageError(f"{path}: is not an image") from error
    except (
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
        struct.error,
        zlib.error,
        Image.DecompressionBombError,
    ) as error:
        raise ImageError(f"{path}: cannot be decoded: {error}") from error


def read_record(record: Record) -> UInt8[ndarray, "h w 3"]:
    """The picture of a record. Raises ImageError, also where its size is not the one its boxes refer to."""
    pixels = read_image(record.path)
    height, width, _ = pixels.shape
    if (width, height) != (record.width, record.height):
        raise ImageError(f"{record.path}: is {width}×{height}, its annotations say {record.width}×{record.height}")
    return pixels


def to_rgb(image: Image.Image) -> UInt8[ndarray, "h w 3"]:
    """The pixels of a decoded picture, as `read_image` returns them."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit greyscale, which Pillow's own conversion would clip instead of scale
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return np.array(image.convert("RGB"), np.uint8)
