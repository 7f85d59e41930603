"""From annotations and image files to array_record shards: in parallel, in any number of attempts, the same bytes.

A shard is written under another name and moved to its place when it is whole; a note in `WORK` then says which images
are in it. When all are there, the index and the annotations of those images follow, and tfds's dataset_info.json comes
last: a folder with it is complete.
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from opendet_jax.config import split_of
from opendet_jax.data.datasets import read_annotations
from opendet_jax.data.formats.json_stream import is_list
from opendet_jax.data.formats.label_folders import label_form
from opendet_jax.data.formats.lvis_form import write_annotations
from opendet_jax.data.formats.records import Dataset, Problems, Record
from opendet_jax.data.images import why_missing
from opendet_jax.data.pixels import MAX_PIXELS
from opendet_jax.data.prepared.builders import BUILDERS, DetectionBuilder
from opendet_jax.data.prepared.read import ANNOTATIONS, COMPLETE, INDEX, WORK, checksum, pack
from opendet_jax.data.prepared.shards import Note, Preparation, PrepareError, write_shards
from opendet_jax.data.show import draw_summary, summarise
from opendet_jax.files import replacing, write_json

SHARDS = 64  # at least so many workers have something to do
FEWEST, MOST = 256, 4096  # images of a shard; at most: 1.7 million are then fewer files than a process may have open
LOOKED_FOR = 50  # images, before work starts
SUMMARY, PICTURE = "summary.json", "summary.png"


@dataclass(frozen=True)
class Job:
    """What to prepare: `data_set` is a name of catalogue.SOURCES, the rest as for `read_annotations`."""

    data_set: str
    annotations: Path
    images: str | Path  # may be empty where the annotations say where the pictures lie
    out: Path
    split: str = "train"
    name_field: str = ""
    minival: bool = False
    images_per_shard: int = 0  # 0: SHARDS shards of FEWEST to MOST images
    max_pixels: int = MAX_PIXELS  # of a picture; larger ones are left out


def prepare(job: Job, workers: int = 0, progress: bool = True) -> dict[str, Any]:
    """Fills `job.out`, or goes on where an earlier call was ended; returns what summary.json holds.

    Images that cannot be read, or are not of the size their annotations say, are left out and listed. `workers` threads
    read, decode and write (0: one for each core).

    Raises:
        AnnotationError: the annotations cannot be used.
        PrepareError: no image can be read, the disk is full, it was interrupted, or the folder holds something else.
    """
    _check_job(job)
    dataset, problems = read_annotations(job.annotations, job.images, job.name_field, job.minival, job.split)
    if not dataset.records:
        raise PrepareError(f"{job.annotations}: there is no image")
    root = _root(job, dataset)
    step = job.images_per_shard or min(max(-(-len(dataset) // SHARDS), FEWEST), MOST)
    plan = {
        "data_set": job.data_set,
        "split": job.split,
        "images_per_shard": step,
        "records": checksum(pack(dataset.records, dataset.categories, root)),
    }
    if job.max_pixels != MAX_PIXELS:
        plan["max_pixels"] = job.max_pixels
    if (job.out / COMPLETE).is_file():
        return _completed(job.out, plan)
    _look_for_images(dataset.records, root)
    shards = [dataset.records[i : i + step] for i in range(0, len(dataset), step)]
    builder = BUILDERS[job.data_set](shards, job.split, job.out, job.max_pixels)
    preparation = Preparation(job.out, plan)
    try:
        with preparation.begun():
            notes = write_shards(builder, preparation, workers or _cores(), progress)
            return _finish(job, root, builder, preparation, notes, problems, dataset)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise _ended(preparation, len(shards), "the disk is full" if full else str(error)) from error
    except KeyboardInterrupt as error:
        raise _ended(preparation, len(shards), "stopped") from error


def _check_job(job: Job) -> None:
    if not re.fullmatch("[A-Za-z][A-Za-z0-9_]*", job.split) or job.split == "all":
        raise PrepareError(
            f"split {job.split!r}: must be letters, digits and _, and not 'all', which is tfds's own word"
        )
    if (form := label_form(split_of(job.annotations)[0])) and job.data_set != "label_folder":
        raise PrepareError(f"{job.annotations}: is in {form}'s form, which --dataset label_folder is for")
    if job.data_set == "label_folder" and not form:
        raise PrepareError(f"{job.annotations}: is neither a YOLO nor a Pascal VOC folder")
    if not job.images and job.annotations.is_file() and not form:
        raise PrepareError(f"{job.annotations}: is a json, and needs the folder of its images: --images DIR")
    if job.annotations.is_file() and is_list(job.annotations) and job.data_set != "visual_genome":
        raise PrepareError(f"{job.annotations}: is in Visual Genome's form, and not {job.data_set}")


def _finish(
    job: Job,
    root: Path,
    builder: DetectionBuilder,
    preparation: Preparation,
    notes: Sequence[Note],
    problems: Problems,
    read: Dataset,
) -> dict[str, Any]:
    """Everything beside the shards, of the images that they hold."""
    left_out = [
        {"image_id": shard[place].image_id, "reason": reason}
        for shard, note in zip(builder.shards, notes, strict=True)
        for place, reason in note.left_out
    ]
    kept = tuple(shard[i] for shard, note in zip(builder.shards, notes, strict=True) for i in note.stored)
    if not kept:
        raise PrepareError(f"{root}: none of the {len(left_out)} images can be read: {left_out[0]['reason']}")
    dataset = Dataset(read.annotations, kept, read.categories)
    with replacing(job.out / INDEX) as part, part.open("wb") as file:
        np.savez(file, allow_pickle=False, **pack(kept, read.categories, root))
    write_annotations(dataset, root, job.out / ANNOTATIONS)
    draw_summary(dataset, job.data_set, job.out / PICTURE)
    found = {
        "plan": preparation.plan,
        "annotations": str(job.annotations),
        **summarise(dataset),
        "shards": len(notes),
        "bytes": sum(note.bytes for note in notes),
        "problems": {
            kind: {"count": count, "examples": problems.examples[kind]} for kind, count in problems.counts.items()
        },
        "left_out": left_out,
    }
    write_json(job.out / SUMMARY, found)
    split = tfds.core.SplitInfo(
        name=job.split, shard_lengths=[len(note.stored) for note in notes], num_bytes=found["bytes"]
    )
    builder.info.set_splits(tfds.core.SplitDict([split]))
    made = preparation.work / "tfds"
    made.mkdir(exist_ok=True)
    builder.info.write_to_directory(made)
    preparation.complete(made)
    return found


def _root(job: Job, dataset: Dataset) -> Path:
    """The folder that all pictures lie in."""
    if label_form(split_of(job.annotations)[0]):
        return Path(os.path.commonpath([record.path.parent for record in dataset.records]))
    return job.annotations if job.annotations.is_dir() else Path(job.images)


def _completed(out: Path, plan: dict[str, Any]) -> dict[str, Any]:
    try:
        found = json.loads((out / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PrepareError(f"{out / SUMMARY}: cannot be read: {error}") from error
    if found.get("plan") != plan:
        raise PrepareError(f"{out}: holds another prepared data set; delete it or name another folder")
    shutil.rmtree(out / WORK, ignore_errors=True)  # of a process killed at the very end
    return found


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _look_for_images(records: Sequence[Record], images: Path) -> None:
    sample = records[:: max(1, len(records) // LOOKED_FOR)]
    if not any(record.stored or record.path.is_file() for record in sample):
        raise PrepareError(
            f"{images}: none of the {len(sample)} images looked for is there, for example {sample[0].path}"
            f"{why_missing(sample[0].path)}"
        )


def _ended(preparation: Preparation, shards: int, why: str) -> PrepareError:
    finished = sum(preparation.note(number) is not None for number in range(shards))
    return PrepareError(
        f"{preparation.out}: {why}; {finished} of {shards} shards are finished and kept, the same command goes on"
    )
