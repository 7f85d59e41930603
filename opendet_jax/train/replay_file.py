"""The batch of a step that was not finite, in a file: <workdir>/non_finite/step_<n>.npz. Nothing in it can run."""

import re
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Int64
from numpy import ndarray

from opendet_jax.batch import Batch, Images, Objects
from opendet_jax.errors import InputError
from opendet_jax.files import replacing
from opendet_jax.train.finite import Sent

FOLDER = "non_finite"


class ReplayError(InputError):
    """A file that holds no batch, or not all of it."""


@dataclass(frozen=True)
class Replayed:
    step: int  # steps taken before it: that of the checkpoint it started from
    batch: Batch  # of numpy arrays, of all processes
    image_ids: Int64[ndarray, "B"]


def save_batch(workdir: Path, sent: Sent) -> tuple[Path, Int64[ndarray, "B"]]:
    """Writes the batch, put together from all processes (each calls this). Its file, and the ids of its images.

    Where the workdir cannot be written the file is in a new folder of the system's place for temporary files. Raises
    OSError where that cannot be written either.
    """
    path = workdir / FOLDER / f"step_{sent.step + 1}.npz"
    images, objects = sent.batch.batch.images, sent.batch.batch.objects
    arrays: dict[str, Any] = {f"images.{name}": value for name, value in vars(images).items()}
    arrays |= {f"objects.{name}": value for name, value in vars(objects).items()}
    arrays |= {"image_ids": sent.batch.image_ids, "rows": sent.batch.rows}
    if jax.process_count() > 1:
        arrays["image_ids"] = arrays["image_ids"].view(np.int32).reshape(-1, 2)  # JAX would cut off the upper half
        arrays = dict(multihost_utils.process_allgather(arrays, tiled=True))
        arrays["image_ids"] = np.ascontiguousarray(arrays["image_ids"]).view(np.int64).reshape(-1)
    order = np.argsort(arrays.pop("rows"))
    arrays = {name: np.asarray(array)[order] for name, array in arrays.items()}
    if jax.process_index() == 0:
        arrays["step"] = np.int64(sent.step)
        try:
            _write(path, arrays)
        except OSError:
            path = Path(tempfile.mkdtemp(prefix="opendet_jax_")) / path.name
            _write(path, arrays)
    return path, arrays["image_ids"]


def _write(path: Path, arrays: dict[str, Any]) -> None:
    with replacing(path) as part, part.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def load_batch(path: Path) -> Replayed:
    """What `save_batch` wrote. Raises ReplayError."""
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        images = Images(arrays["images.pixels"], arrays["images.mask"])
        objects = Objects(*(arrays[f"objects.{name}"] for name in ("boxes", "valid", "texts", "tokens")))
        return Replayed(int(arrays["step"]), Batch(images, objects), arrays["image_ids"])
    except FileNotFoundError as error:
        raise ReplayError(f"{path}: no such file; training writes it where a step is not finite") from error
    except KeyError as error:
        raise ReplayError(f"{path}: has no array {error}: it is not the file of a batch") from error
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise ReplayError(f"{path}: cannot be read, or is not the file of a batch: {error}") from error


def replayed_steps(workdir: Path) -> set[int]:
    """The steps whose checkpoints the files in a workdir start from."""
    matches = (re.fullmatch(r"step_(\d+)\.npz", path.name) for path in (workdir / FOLDER).glob("*"))
    return {int(match[1]) - 1 for match in matches if match}
