"""The pictures of a data set, and whatever else a caller calls an image, as RGB."""

import io
import itertools
import os
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
from absl import logging
from jaxtyping import UInt8
from numpy import ndarray
from PIL import Image

from opendet_jax.data.formats.records import Dataset, Record
from opendet_jax.data.pixels import MAX_PIXELS, BinaryFile, ImageError, Upright, decode

SAMPLE = 10_000  # files of a data set that are looked for before it is used
NAMED = 5  # missing ones that the message names
SEARCHED = 1000  # folders in which a missing one is looked for
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".7z", ".rar")
ADDRESS = re.compile(r"(https?|ftp|file|s3|gs):/|data:image/", re.IGNORECASE)  # a Path makes one slash of two


@runtime_checkable
class Arraylike(Protocol):
    """What NumPy makes an array of: that of JAX, a tensor of PyTorch in the main memory."""

    def __array__(self) -> Any: ...


ImageLike: TypeAlias = (
    np.ndarray | str | os.PathLike | Image.Image | bytes | bytearray | memoryview | BinaryFile | Arraylike
)


def read_image(path: Path, max_pixels: int = MAX_PIXELS) -> UInt8[ndarray, "h w 3"]:
    """The pixels of a file, as `open_image` decodes it. Raises ImageError."""
    return np.array(open_image(path, max_pixels), np.uint8)


def open_image(path: Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """A file as `decode` makes it RGB. Raises ImageError."""
    return decode(path, path, max_pixels).image


def open_record(record: Record, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The picture of a record. Raises ImageError, also where its size is not the one its boxes refer to."""
    if record.stored is None:
        return _of_its_size(record, decode(record.path, record.path, max_pixels))
    return decode_record(record, encoded(record), max_pixels)


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


def decode_record(record: Record, content: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """`open_record` of what `encoded` gave. Raises ImageError."""
    return _of_its_size(record, decode(io.BytesIO(content), record.path, max_pixels))


def _of_its_size(record: Record, upright: Upright) -> Image.Image:
    image, annotated = upright.image, (record.width, record.height)
    if image.size != annotated:
        said = f"{record.path}: is {_times(image.size)}, its annotations say {_times(annotated)}"
        if image.size == annotated[::-1]:
            if upright.orientation > 4:
                said += (
                    f": its EXIF (orientation {upright.orientation}) turns it upright, and the annotations have "
                    "the size before that; they must be of the upright picture"
                )
            else:
                said += ": width and height are exchanged, and no EXIF in it says that it is to be turned"
        raise ImageError(said)
    return image


def _times(size: tuple[int, int]) -> str:
    return f"{size[0]}×{size[1]}"


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
        f"in {folder} are missing: {names}{', …' if len(missing) > NAMED else ''}{why_missing(missing[0])}"
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


def why_missing(path: Path) -> str:
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


def load_image(image: ImageLike, max_pixels: int = MAX_PIXELS) -> UInt8[np.ndarray, "H W 3"]:
    """RGB of an array, a tensor, a file, its content, or a PIL image.

    An array is (H, W, 3) RGB, (H, W, 4) with alpha, (H, W) or (H, W, 1) grey, or (H, W, 2) grey with alpha; of uint8,
    floats from 0 to 1, or bool. What is no array is turned upright as its EXIF says. What is transparent becomes white
    (`decode`).

    Raises:
        TypeError: something else, or an array of another dtype.
        ValueError: an array of another shape, an empty image, or (as ImageError, naming it) a file that is missing or
            no picture, an address, or pixels whose range is not known.
    """
    if isinstance(image, np.ndarray):
        return _from_array(image)
    if isinstance(image, str | os.PathLike):
        if ADDRESS.match(os.fspath(image)):
            raise ImageError(
                f"{os.fspath(image):.80}: is an address; load it yourself and give the file or its content"
            )
        return read_image(Path(image), max_pixels)
    if isinstance(image, Image.Image):
        if 0 in image.size:
            raise ValueError(f"the image is empty: {image.width}×{image.height}")
        return _pixels(image, getattr(image, "filename", "") or "the image", max_pixels)
    if isinstance(image, bytes | bytearray | memoryview):
        return _pixels(io.BytesIO(image), f"the image of {len(image)} bytes", max_pixels)
    if isinstance(image, BinaryFile) and not isinstance(image, io.TextIOBase):
        return _pixels(image, getattr(image, "name", "the image"), max_pixels)
    if isinstance(image, Arraylike):
        try:
            pixels = np.asarray(image)
        except (TypeError, RuntimeError) as error:  # PyTorch's: on a GPU, with a gradient, of bfloat16
            raise TypeError(f"NumPy can make no array of the image: {error}") from error
        return _from_array(pixels)
    raise TypeError(
        "an image is an array, a path, a PIL image, the bytes of a file or a file opened for bytes ('rb'), "
        f"not {type(image).__name__}"
    )


def _pixels(source: BinaryFile | Image.Image, name: object, max_pixels: int) -> UInt8[np.ndarray, "H W 3"]:
    return np.array(decode(source, name, max_pixels).image, np.uint8)


def _from_array(pixels: np.ndarray) -> UInt8[np.ndarray, "H W 3"]:
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] not in (1, 2, 3, 4)):
        last = "; the channels come last: image.permute(1, 2, 0) of a tensor, np.moveaxis(image, 0, -1) of an array"
        hint = last if pixels.ndim == 3 and pixels.shape[0] in (1, 2, 3, 4) else "; several go in a list"
        raise ValueError(f"an image array has shape (H, W, 3) or (H, W), not {pixels.shape}{hint}")
    if pixels.size == 0:
        raise ValueError(f"the image is empty: shape {pixels.shape}")
    of_bytes = _as_bytes(pixels)
    channels = of_bytes.shape[2] if of_bytes.ndim == 3 else 0
    if channels in (2, 4):
        return _pixels(Image.fromarray(np.ascontiguousarray(of_bytes)), "the image", pixels.size)
    return of_bytes if channels == 3 else np.repeat(of_bytes.reshape(*of_bytes.shape[:2], 1), 3, axis=2)


def _as_bytes(pixels: np.ndarray) -> UInt8[np.ndarray, "..."]:
    """Floats go from 0 to 1, as in `decode`, and like there those that fill less than a quarter of it are refused."""
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype == np.bool_:
        return pixels.astype(np.uint8) * np.uint8(255)
    if pixels.dtype.kind != "f":
        whole = "; image.astype(np.uint8) where its numbers are 0…255, (image >> 8).astype(np.uint8) of 16 bits"
        hint = whole if pixels.dtype.kind in "iu" else ""
        raise TypeError(f"an image array has dtype uint8 (0…255), float (0…1) or bool, not {pixels.dtype.name}{hint}")
    if not np.isfinite(pixels).all():
        raise ImageError("the image: holds numbers that are not finite")
    low, high = float(pixels.min()), float(pixels.max())
    if low * 255 < -0.5 or high * 255 > 255.5:
        raise ImageError(
            f"the image: holds floats from {low:.6g} to {high:.6g}, and floats go from 0 to 1: image.clip(0, 1) where "
            "they hardly leave it, image.astype(np.uint8) of 0…255; what is normalised needs mean and deviation back"
        )
    if 0 < high <= 0.25:
        raise ImageError(
            f"the image: holds floats of at most {high:.6g}, less than a quarter of 0 … 1, so that its brightness is "
            "not known; make bytes of it: uint8, 0…255"
        )
    return np.rint(pixels.astype(np.float32) * 255).astype(np.uint8)
