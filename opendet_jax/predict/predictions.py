"""--mode=predict: a folder of annotated pictures and one predictions.json, from the user's own photographs."""

import glob
import os
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from tqdm import tqdm

from opendet_jax.checkpoints.restore import workdir_of
from opendet_jax.checkpoints.same_config import check_same, in_evaluation
from opendet_jax.compilation import CompilingFirst
from opendet_jax.config import Config, PredictConfig
from opendet_jax.data.images import load_image
from opendet_jax.data.pixels import MAX_PIXELS, ImageError
from opendet_jax.errors import InputError, Interrupted
from opendet_jax.files import replacing, write_json
from opendet_jax.given_names import written_names
from opendet_jax.predict.detector import Detector, load_with

PREDICTIONS = "predictions.json"
Pixels: TypeAlias = UInt8[np.ndarray, "H W 3"]


@dataclass(frozen=True)
class Job:
    """What there is to do, found to be possible before a model is loaded."""

    inputs: Sequence[Path]
    pictures: Sequence[str]  # the name of each in `out`
    out: Path


def find_job(predict: PredictConfig, out: Path) -> Job:
    """The files of `predict.inputs`, and where their pictures go; nothing is written yet.

    Raises InputError: no file matches, an annotated picture would replace an input, the folder cannot be written to.
    """
    inputs = find_inputs(predict.inputs)
    pictures = _picture_names(inputs)
    overwritten = {path.resolve() for path in inputs} & {(out / name).resolve() for name in pictures}
    if overwritten:
        raise InputError(f"predict.output: pictures in {out} would replace {', '.join(map(str, sorted(overwritten)))}")
    there = next(folder for folder in (out, *out.absolute().parents) if os.path.lexists(folder))
    if not there.is_dir():
        raise InputError(f"predict.output: {out} cannot be made: {there} is no folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"predict.output: {there} may not be written to")
    return Job(inputs, pictures, out)


def predict_files(
    detector: Detector, predict: PredictConfig, out_dir: Path | str, max_pixels: int = MAX_PIXELS
) -> list[dict[str, Any]]:
    """Detects in every image of `predict.inputs`; returns what predictions.json holds, one entry an image.

    An entry has file, picture (the annotated one, in `out_dir`) and the fields of `Detections.to_dict`. A file that
    cannot be read is reported on standard error, and the others go on.

    Raises:
        InputError: see `find_job`; or no file can be read, or a picture not be written. Of any error predictions.json
            has the pictures before it.
        Interrupted: Ctrl-C. What has been done is written.
    """
    return _predict(detector, find_job(predict, Path(out_dir)), predict, max_pixels)


def _predict(detector: Detector, job: Job, predict: PredictConfig, max_pixels: int) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = []
    interrupted = False
    try:
        with CompilingFirst(total=len(job.inputs), desc="predict", unit="image") as bar:
            read: deque[tuple[Path, str, Pixels]] = deque()  # of which there is no answer yet
            found_in = detector.detect_stream(
                _readable(job, max_pixels, bar, read),
                *(predict.max_detections, predict.min_score, predict.nms_iou),
                names=written_names(predict.names),
                by=predict.by,
                batch_size=predict.batch_size,
            )
            with _writing(job.out):
                job.out.mkdir(parents=True, exist_ok=True)
            for found in found_in:
                path, name, image = read.popleft()
                with _writing(job.out / name), replacing(job.out / name) as part:
                    found.draw(image).save(part, format="PNG")
                entries.append({"file": str(path), "picture": name, **found.to_dict()})
                bar.update()
    except KeyboardInterrupt:
        interrupted = True
    except Exception:
        with suppress(OSError):  # a full disk is what the error may be of
            if entries:
                write_json(job.out / PREDICTIONS, entries)
        raise
    if interrupted and not entries:
        raise Interrupted(f"stopped before the first of {len(job.inputs)} images was done: nothing is written")
    if not entries:
        raise InputError(f"predict.inputs: none of the {len(job.inputs)} files of {predict.inputs!r} is an image")
    with _writing(job.out):
        write_json(job.out / PREDICTIONS, entries)
    if interrupted:
        raise Interrupted(
            f"stopped: {len(entries)} of {len(job.inputs)} images are done, their pictures and {PREDICTIONS} are in "
            f"{job.out}"
        )
    return entries


def _readable(
    job: Job, max_pixels: int, bar: CompilingFirst, read: deque[tuple[Path, str, Pixels]]
) -> Iterator[Pixels]:
    """The images of the job, each also put into `read`; those that cannot be read are said, and the bar knows."""
    for path, name in zip(job.inputs, job.pictures, strict=True):
        try:
            image = load_image(path, max_pixels)
        except ImageError as error:
            bar.total -= 1
            bar.write(f"skipped: {error}", file=sys.stderr)
            continue
        read.append((path, name, image))
        yield image


def find_inputs(inputs: str) -> list[Path]:
    """Of each line the file, the pictures of the folder, or the files that match the glob; each file once.

    Raises InputError where there is none.
    """
    patterns = inputs.splitlines()
    if not inputs or not all(patterns):
        raise InputError("predict.inputs is empty: give a picture, a folder or a glob")
    return list(dict.fromkeys(path for pattern in patterns for path in _matches(pattern)))


def _matches(pattern: str) -> list[Path]:
    """What is there by its own name is no glob."""
    path = Path(os.path.expanduser(pattern))
    if os.path.isdir(path):
        return _pictures_in(path)
    found = [Path(name) for name in sorted(glob.glob(_own_names_first(path), recursive=True))]
    files = [path for path in found if path.is_file()]
    if not files:
        only = f"; what matches are folders, as {found[0]}" if found else ""
        raise InputError(f"predict.inputs: no file matches {pattern!r}{only}")
    return files


def _own_names_first(path: Path) -> str:
    """The glob, with the part that is there as it is written taken literally: photo[1].jpg, dir[2024]/*.jpg."""
    for there in (path, *path.parents):
        if os.path.exists(there):
            return os.path.join(glob.escape(str(there)), *path.relative_to(there).parts)
    return str(path)


def _pictures_in(folder: Path) -> list[Path]:
    """The files whose names end as those that Pillow opens; the others are counted on standard error."""
    Image.init()
    endings = {ending for ending, form in Image.EXTENSION.items() if form in Image.OPEN}
    try:
        seen = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise InputError(f"predict.inputs: {folder} cannot be listed: {error.strerror}") from error
    files = [path for path in seen if path.is_file()]
    broken = [path.name for path in seen if path.is_symlink() and not path.exists()]
    if broken:
        tqdm.write(f"left out: {len(broken)} links of {folder} to nothing, as {broken[0]}", file=sys.stderr)
    pictures = [path for path in files if path.suffix.lower() in endings]
    if not pictures:
        raise InputError(
            f"predict.inputs: there is no picture in the folder {folder}, which holds {len(files)} files; those of the "
            f"folders below are {folder}/**/*.jpg"
        )
    if len(pictures) < len(files):
        others = [path.name for path in files if path not in pictures]
        tqdm.write(f"left out: {len(others)} files of {folder} that are no pictures, as {others[0]}", file=sys.stderr)
    return pictures


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    """Raises InputError for what the system raises in this context: a full disk, say."""
    try:
        yield
    except OSError as error:
        raise InputError(f"predict.output: {out} cannot be written to: {error.strerror or error}") from error


def _picture_names(inputs: Sequence[Path]) -> list[str]:
    """name.png; where several inputs share a name, name_2.png and so on."""
    names: list[str] = []
    taken: set[str] = set()
    for path in inputs:
        name, number = f"{path.stem}.png", 1
        while name.lower() in taken:  # some file systems do not tell A.png from a.png
            number += 1
            name = f"{path.stem}_{number}.png"
        taken.add(name.lower())
        names.append(name)
    return names


def predict_from_config(config: Config, workdir: Path | str) -> None:
    """Annotates the images of `predict.inputs` into `predict.output`, or <workdir>/predict (`restore.workdir_of`).

    Raises CheckpointError, also where a field to which the parameters are bound is not that of the checkpoint.
    """

    def checked(saved: Config) -> Config:
        check_same(saved.to_dict(), config, workdir, in_evaluation)
        return config

    output = config.predict.output or workdir_of(workdir) / "predict"
    job = find_job(config.predict, Path(output))
    detector = load_with(workdir, config.eval.checkpoint, checked)
    entries = _predict(detector, job, config.predict, config.data.max_pixels)
    objects = sum(len(entry["boxes"]) for entry in entries)
    print(f"{len(entries)} images, {objects} objects. In {job.out}: an annotated picture of each, {PREDICTIONS}")
