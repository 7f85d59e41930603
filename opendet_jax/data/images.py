"""Image files, and whatever else a caller calls an image, to RGB."""

import io
import itertools
import os
import struct
import unicodedata
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

import numpy as np
from absl import logging
from jaxtyping import UInt8
from numpy import ndarray
from PIL import Image, ImageOps, UnidentifiedImageError

from opendet_jax.data.formats.records import Dataset, Record
from opendet_jax.errors import InputError

SAMPLE = 10_000  # files of a data set that are looked for before it is used
NAMED = 5  # missing ones that the message names
SEARCHED = 1000  # folders in which a missing one is looked for
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".7z", ".rar")

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


def check_present(dataset: Dataset, where: str, max_missing: float) -> None:
    """Looks for the files of a data set's pictures, of more than SAMPLE for an even sample of them.

    `where` names the section of the config, as "data.train". A share of missing ones above `max_missing` raises
    ImageError, which names the folder, the first of them and the likely reason. Fewer are a warning, as is a single one
    of several, unless the share is 0. Pictures in shards have no files.
    """
    records = [record for record in dataset.records if record.stored is None]
    sample = records[:: max(1, -(-len(records) // SAMPLE))]
    missing = [record.path for record in sample if not _is_file(record.path)]
    if not missing:
        return
    folder = Path(os.path.commonpath([record.path.parent for record in sample]))
    looked = f"{len(sample):,}" if len(sample) == len(records) else f"{len(sample):,} looked for, of {len(records):,},"
    names = ", ".join(str(path.relative_to(folder)) for path in missing[:NAMED])
    said = (
        f"config.{where}.images: {len(missing):,} of the {looked} pictures of {dataset.annotations} are not there; "
        f"in {folder} are missing: {names}{', …' if len(missing) > NAMED else ''}{_why_missing(missing[0])}"
    )
    few = 1 == len(missing) < len(sample) and max_missing > 0
    if len(missing) > max_missing * len(sample) and not few:
        raise ImageError(said)
    logging.warning("%s", said)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file can have, a folder that may not be looked into
        return False


def _why_missing(path: Path) -> str:
    """What the disk has in the place of a missing file, as the end of a sentence; empty where nothing helps."""
    there = next((folder for folder in path.parents if folder.is_dir()), Path("."))
    entries, reasons = _listed(there), []
    if there != path.parent:
        reasons.append(f"there is no folder {path.parent.relative_to(there)} in {there}")
    elif not entries:
        reasons.append(f"{there} is empty")
    alike = [entry for entry in _listed(path.parent) if _spelling(entry.name) == _spelling(path.name)]
    archives = [entry for entry in entries if entry.suffix.lower() in ARCHIVES]
    elsewhere = next(_same_name(path, there), None)
    if alike:
        reasons.append(f"{alike[0].name} is there, which is spelled otherwise")
    elif elsewhere is not None:
        reasons.append(f"{elsewhere} has its name: is this the folder?")
    elif archives:
        reasons.append(f"{archives[0]} is there: has it been unpacked?")
    return "".join(f"; {reason}" for reason in reasons)


def _spelling(name: str) -> str:
    """Without what computers write in different ways: case, accents as one or two characters, .jpg or .jpeg."""
    stem, _, _ = unicodedata.normalize("NFC", name).casefold().rpartition(".")
    return stem


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _same_name(path: Path, there: Path) -> Iterator[Path]:
    """Files of its name in folders around a missing one: two levels below the last that is there, above, beside."""
    near = itertools.chain([there], *(there.glob(below) for below in ("*/", "*/*/")))
    if there == path.parent:
        above = there.absolute().parent
        near = itertools.chain(near, [above], above.glob("*/"))
    for folder in itertools.islice(near, SEARCHED):
        if folder.is_dir() and _is_file(folder / path.name):
            yield folder / path.name


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
