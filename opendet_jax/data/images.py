"""Image files, and whatever else a caller calls an image, to RGB."""

import io
import os
import struct
import zlib
from pathlib import Path
from typing import TypeAlias

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray
from PIL import Image, ImageOps, UnidentifiedImageError

from opendet_jax.data.formats.records import Record
from opendet_jax.errors import InputError

ImageLike: TypeAlias = np.ndarray | str | os.PathLike | Image.Image


class ImageError(InputError):
    """A file that is missing, damaged, or not the picture its json describes: the message names it."""


def read_image(path: Path) -> UInt8[ndarray, "h w 3"]:
    """The pixels of a file, as `open_image` decodes it. Raises ImageError."""
    return np.array(open_image(path), np.uint8)


def open_image(path: Path) -> Image.Image:
    """Decode a file to RGB, turned upright as its EXIF says. Transparent parts become white; 16 bits become 8.

    Raises ImageError.
    """
    return _decode(path, path)


def _decode(source: Path | io.BytesIO, path: Path) -> Image.Image:
    """A file or its content, which messages call `path`."""
    try:
        with Image.open(source) as file:
            file.load()
            ImageOps.exif_transpose(file, in_place=True)
            return _rgb(file)
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


def open_record(record: Record) -> Image.Image:
    """The picture of a record. Raises ImageError, also where its size is not the one its boxes refer to."""
    if record.stored is None:
        return _of_its_size(record, open_image(record.path))
    return decode_record(record, encoded(record))


def encoded(record: Record) -> bytes:
    """The content of a record's image file, wherever it is stored. Raises ImageError where it cannot be read."""
    try:
        if record.stored is None:
            return record.path.read_bytes()
        return record.stored.pictures[record.stored.number]
    except FileNotFoundError as error:
        raise ImageError(f"{record.path}: no such image") from error
    except (OSError, ValueError, RuntimeError) as error:  # a damaged shard; a name that no file can have
        raise ImageError(f"{record.path}: cannot be read: {error}") from error


def decode_record(record: Record, content: bytes) -> Image.Image:
    """`open_record` of what `encoded` gave. Raises ImageError."""
    return _of_its_size(record, _decode(io.BytesIO(content), record.path))


def _of_its_size(record: Record, image: Image.Image) -> Image.Image:
    if image.size != (record.width, record.height):
        width, height = image.size
        raise ImageError(f"{record.path}: is {width}×{height}, its annotations say {record.width}×{record.height}")
    return image


def to_rgb(image: Image.Image) -> UInt8[ndarray, "h w 3"]:
    """The pixels of a decoded picture, as `read_image` returns them."""
    return np.array(_rgb(ImageOps.exif_transpose(image)), np.uint8)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit greyscale, which Pillow's own conversion would clip instead of scale
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")


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
