"""Whatever Pillow can open to upright RGB of 8 bits. docs/data.md has the table of its modes.

Method: docs/method.md#1-image.
"""

import re
import struct
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar, cast, runtime_checkable

import numpy as np
from jaxtyping import Shaped
from numpy import ndarray
from PIL import Image, UnidentifiedImageError

from opendet_jax.config import DataConfig
from opendet_jax.errors import InputError

MAX_PIXELS = DataConfig.max_pixels
ORIENTATION = 0x0112  # the tag, in EXIF and in TIFF
BITS, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339  # tags of TIFF
SIGNED = 2  # a sample format
PNG_METADATA = (b"eXIf", b"Raw profile type", b"adobe.xmp")  # one of these where a PNG has an orientation
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
Made = TypeVar("Made")


class ImageError(InputError):
    """A file that is missing, damaged, or not the picture its json describes: the message names it."""


@runtime_checkable
class BinaryFile(Protocol):
    """A file opened for bytes, or what reads like one."""

    def read(self, size: int = -1, /) -> bytes: ...


class Upright(NamedTuple):
    image: Image.Image  # RGB
    orientation: int  # by which it has been turned, as EXIF counts; 1: it lay upright


def decode(source: Path | BinaryFile | Image.Image, name: object, max_pixels: int = MAX_PIXELS) -> Upright:
    """A file, its content or an opened picture, which messages call `name`; of several frames the first.

    It is turned upright as its EXIF says. Transparent parts become white, more than 8 bits become 8.
    Raises ImageError, whatever the decoder raises.
    """
    try:
        return _whatever_is_warned_of(lambda: _open(source, name, max_pixels))
    except ImageError:
        raise
    except FileNotFoundError as error:
        raise ImageError(f"{name}: no such image") from error
    except UnidentifiedImageError as error:
        raise ImageError(f"{name}: is not an image, or of a kind that Pillow cannot read") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name}: is too large for data.max_pixels = {max_pixels:,}: {error}") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise ImageError(f"{name}: cannot be decoded: {error}") from error
    except Exception as error:  # decoders let anything out, from KeyError to MemoryError
        raise ImageError(f"{name}: cannot be decoded: {type(error).__name__}: {error}") from error


def has_size(path: Path, width: int, height: int) -> bool:
    """Whether a file may be a picture of this size, by its header. True where that cannot be told: reading it will."""

    def look() -> bool:
        with Image.open(path) as file:
            return file.size == (width, height) or (file.size == (height, width) and _orientation(file) > 4)

    try:
        return _whatever_is_warned_of(look)
    except Exception:
        return True


def upright_size(path: Path) -> tuple[int, int]:
    """Width and height of what `decode` makes of a file, by what stands before its pixels. Raises ImageError."""

    def look() -> tuple[int, int]:
        with path.open("rb") as opened, Image.open(opened) as file:
            width, height = file.size
            if file.format == "PNG":  # whose pixels Pillow decodes to look for metadata behind them
                content = path.read_bytes()
                if not any(mark in content for mark in PNG_METADATA):
                    return width, height
            if _orientation(file) <= 4:
                return width, height
        # Some TIFFs are turned by Pillow when they are opened, some when they are read, some never.
        return decode(path, path).image.size if file.format == "TIFF" else (height, width)

    try:
        return _whatever_is_warned_of(look)
    except FileNotFoundError as error:
        raise ImageError(f"{path}: no such image") from error
    except Exception as error:  # decoders let anything out
        raise ImageError(f"{path}: its size cannot be read: {type(error).__name__}: {error}") from error


def _whatever_is_warned_of(make: Callable[[], Made]) -> Made:
    """Where warnings are errors: what Pillow wonders about in metadata is no reason to refuse a picture."""
    try:
        return make()
    except Warning:
        with warnings.catch_warnings(action="ignore"):
            return make()


def _open(source: Path | BinaryFile | Image.Image, name: object, max_pixels: int) -> Upright:
    if isinstance(source, Image.Image):
        return _upright(source, name, max_pixels)
    if isinstance(source, Path):  # by its path Pillow would map a TIFF into memory, and scramble one to be turned
        with source.open("rb") as opened:
            return _open(opened, name, max_pixels)
    if max_pixels > MAX_PIXELS and Image.MAX_IMAGE_PIXELS is not None:
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, max_pixels)  # Pillow's own limit is the whole process's
    with Image.open(cast(Any, source)) as file:
        return _upright(file, name, max_pixels)


def _upright(file: Image.Image, name: object, max_pixels: int) -> Upright:
    width, height = file.size
    if width * height > max_pixels:
        raise ImageError(
            f"{name}: has {width}×{height} = {width * height:,} pixels, more than data.max_pixels = {max_pixels:,}"
        )
    orientation = _orientation(file)
    file.load()
    left = _orientation(file)  # Pillow turns TIFFs itself, and forgets the tag
    image = _rgb(file, name)
    return Upright(image.transpose(TURNS[left]) if left in TURNS else image, orientation)


def _orientation(image: Image.Image) -> int:
    """1 … 8; 1 where none can be read. Nothing else in the metadata matters, whatever is wrong with it."""
    value = None
    for read in (lambda _: image.getexif().get(ORIENTATION), _of_exif, _of_xmp):
        try:
            value = read(image.info)
        except Warning:
            raise
        except Exception:  # metadata of any form raise anything
            continue
        if value is not None:
            break
    return _number(value)


def _of_exif(info: Mapping[Any, Any]) -> Any:
    """The orientation that Pillow loses behind a damaged tag: here it reads a copy of the block without other tags."""
    block = info.get("exif")
    if block is None and "Raw profile type exif" in info:  # of PNG
        block = bytes.fromhex("".join(info["Raw profile type exif"].split("\n")[3:]))
    block = re.sub(b"^(Exif\0\0){1,2}", b"", block or b"")
    order, head = ("<", b"II*\0") if block[:2] == b"II" else (">", b"MM\0*")
    [start] = struct.unpack_from(f"{order}L", block, 4)
    [count] = struct.unpack_from(f"{order}H", block, start)
    entries = (block[place : place + 12] for place in range(start + 2, start + 2 + 12 * count, 12))
    wanted = struct.pack(f"{order}H", ORIENTATION)
    entry = next((entry for entry in entries if entry.startswith(wanted)), None)
    if entry is None:
        return None
    exif, directory = Image.Exif(), struct.pack(f"{order}H", 1) + entry + bytes(4)
    exif.load(head + struct.pack(f"{order}L", len(block)) + block[8:] + directory)
    return exif.get(ORIENTATION)


def _of_xmp(info: Mapping[Any, Any]) -> Any:
    """The orientation of XMP, which Pillow does not look for where EXIF is damaged."""
    xmp = info.get("XML:com.adobe.xmp") or info.get("xmp") or ""
    found = re.search(r'tiff:Orientation(?:="|>)([1-8])', xmp if isinstance(xmp, str) else xmp.decode("latin-1"))
    return found and found[1]


def _number(value: Any) -> int:
    """An orientation of any type: 6, 6.0, 6/1, b"\\6", "6", (6, 6)."""
    if isinstance(value, tuple | list):
        value = value[0] if value else None
    if isinstance(value, str):
        value = value.encode("latin-1", "replace")
    if isinstance(value, bytes):
        value = value.strip(b"\0 ")
        value = int(value) if value.isdigit() else int.from_bytes(value)
    return next((number for number in TURNS if number == value), 1)


def _rgb(image: Image.Image, name: object) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I") or _is_signed_byte(image):
        image = _eight_bits(image, name)
    elif image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _tiff_tag(image: Image.Image, tag: int, default: int) -> int:
    """Of the first channel."""
    value = getattr(image, "tag_v2", {}).get(tag, default)
    return value[0] if isinstance(value, tuple) else value


def _is_signed_byte(image: Image.Image) -> bool:
    return image.mode == "L" and _tiff_tag(image, SAMPLE_FORMAT, 1) == SIGNED


def _eight_bits(image: Image.Image, name: object) -> Image.Image:
    """Grey of other numbers than bytes, brought from the range of their type to 0 … 255.

    Integers have 16 bits, as Pillow itself has it, or what a TIFF says; floats go from 0 to 1. Raises ImageError where
    the numbers are not of that range, or fill less than a quarter of it: 12 bits in 16, say, would be almost black.
    """
    values, most = _numbers(image)
    if not np.isfinite(values).all():
        raise ImageError(f"{name}: holds numbers that are not finite")
    low, high = values.min(), values.max()
    scaled = np.rint(values * 255) if values.dtype.kind == "f" else values * 256 >> most.bit_length()
    outside = scaled.min() < 0 or scaled.max() > 255
    if outside or 0 < high <= most / 4:
        why = "outside" if outside else "less than a quarter of"
        raise ImageError(
            f"{name}: holds numbers from {low:.6g} to {high:.6g}, {why} the range 0 … {most:,} of its kind "
            f"({image.mode}), so that its brightness is not known; save it with 8 bits, or with the whole range"
        )
    if image.mode[0] in "IF" and _tiff_tag(image, PHOTOMETRIC, 1) == 0:  # white is zero
        scaled = 255 - scaled
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        scaled[values == transparent] = 255
    return Image.fromarray(scaled.astype(np.uint8))


def _numbers(image: Image.Image) -> tuple[Shaped[ndarray, "h w"], int]:
    """The pixels, and the largest number of their type."""
    values = np.asarray(image)
    if image.mode == "F":
        return values.astype(np.float64), 1
    bits, signed = _tiff_tag(image, BITS, 16), _tiff_tag(image, SAMPLE_FORMAT, 1) == SIGNED
    if image.mode == "L":
        values = values.view(np.int8)
    values = values.astype(np.int64)
    if bits == 32 and not signed:
        values &= 2**32 - 1  # Pillow's are signed
    return values, 2 ** (bits - signed) - 1
