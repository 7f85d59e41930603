"""Folders that `python -m opendet_jax.data prepare` has written: what is in them, and reading them back."""

import zipfile
from pathlib import Path

import numpy as np

from opendet_jax.data.index import unpack
from opendet_jax.data.json_stream import AnnotationError
from opendet_jax.data.records import Dataset
from opendet_jax.data.shards import Shards

ANNOTATIONS = "annotations.json"  # in LVIS v1's form, without segmentations; what evaluation takes as the truth
INDEX = "index.npz"  # the records
COMPLETE = "dataset_info.json"  # tfds's own, written last
WORK = ".preparing"  # what is known of finished shards, until all are


def read_prepared(folder: Path) -> Dataset:
    """The data set of a folder; its pictures are read from the shards. Raises AnnotationError."""
    if not (folder / COMPLETE).is_file():
        if (folder / WORK).is_dir():
            raise AnnotationError(f"{folder}: is not complete yet: run the command that prepares it again")
        raise AnnotationError(
            f"{folder}: is a folder, and not one that `python -m opendet_jax.data prepare` has written; "
            "annotations are such a folder or a json"
        )
    try:
        with (folder / INDEX).open("rb") as file, np.load(file) as index:
            arrays = {name: index[name] for name in index.files}
        return unpack(arrays, folder / ANNOTATIONS, folder, Shards(folder))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise AnnotationError(f"{folder / INDEX}: is damaged: {error}") from error
