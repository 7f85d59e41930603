"""Folders that `python -m opendet_jax.data prepare` has written: of which data set, what is in them, reading them back.

All records of a data set are a few arrays, in a file that loads in seconds and under one checksum; their pictures lie
in array_record shards.
"""

import hashlib
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray

from opendet_jax.data.formats.json_stream import AnnotationError
from opendet_jax.data.formats.records import Category, Dataset, Pictures, Record, Stored

PICTURE = "image"  # the feature with a picture's file as it was, not decoded
Arrays = Mapping[str, ndarray]
ANNOTATIONS = "annotations.json"  # in LVIS v1's form, without segmentations; what evaluation takes as the truth
INDEX = "index.npz"  # the records
COMPLETE = "dataset_info.json"  # tfds's own, written last
WORK = ".preparing"  # what is known of finished shards, until all are


class Source(NamedTuple):
    """Of a published data set, what tfds notes beside the records."""

    title: str
    homepage: str
    licence: str
    citation: str


SOURCES = {
    "visual_genome": Source(
        "Visual Genome: objects.json, or GenerateU's train_from_objects.json",
        "https://homes.cs.washington.edu/~ranjay/visualgenome/",
        "CC BY 4.0",
        "Krishna et al.: Visual Genome: Connecting Language and Vision Using Crowdsourced Dense Annotations, 2017",
    ),
    "lvis_v1": Source(
        "LVIS v1, on the photographs of COCO 2017",
        "https://www.lvisdataset.org/",
        "annotations CC BY 4.0; each photograph its own",
        "Gupta et al.: LVIS: A Dataset for Large Vocabulary Instance Segmentation, 2019",
    ),
    "coco_2017": Source(
        "COCO 2017",
        "https://cocodataset.org/",
        "annotations CC BY 4.0; each photograph its own",
        "Lin et al.: Microsoft COCO: Common Objects in Context, 2014",
    ),
    "objects365_v2": Source(
        "Objects365 v2",
        "https://www.objects365.org/",
        "annotations CC BY 4.0; each photograph its own",
        "Shao et al.: Objects365: A Large-Scale, High-Quality Dataset for Object Detection, 2019",
    ),
    "label_folder": Source("a YOLO folder (data.yaml) or a Pascal VOC folder", "", "", ""),
    "coco_json": Source("any json in the form of COCO or LVIS", "", "", ""),
}


class Shards:
    """Encoded pictures by number, over all shards in order. Shards are opened when first used; safe for threads."""

    def __init__(self, folder: Path):
        self.__setstate__(folder)

    def __getitem__(self, number: int) -> bytes:
        with self._lock:
            if self._source is None:
                self._source = _open(self._folder)
        return self._source[number][PICTURE]

    def __getstate__(self) -> Path:
        return self._folder

    def __setstate__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = Lock()
        self._source: Any = None


def _open(folder: Path) -> Any:
    import tensorflow_datasets as tfds  # takes seconds, and only prepared folders need it

    builder: Any = tfds.builder_from_directory(folder)
    [split] = builder.info.splits
    return builder.as_data_source(split, decoders={PICTURE: tfds.decode.SkipDecoding()})


def pack(records: Sequence[Record], categories: Sequence[Category], root: Path) -> Arrays:
    """`unpack` gives them back, but for `root`, the folder above the pictures."""
    rows: dict[str, int] = {}
    name_rows = [rows.setdefault(name, len(rows)) for record in records for names in record.names for name in names]
    boxes = [record.boxes for record in records]
    category_ids = [record.category_ids for record in records]
    return {
        "image_ids": np.array([record.image_id for record in records], np.int64),
        "sizes": np.array([(record.width, record.height) for record in records], np.int32).reshape(-1, 2),
        "files": _text([record.path.relative_to(root).as_posix() for record in records]),
        "box_counts": np.array([len(record.boxes) for record in records], np.int32),
        "boxes": np.concatenate([np.zeros((0, 4), np.float32), *boxes]),
        "category_ids": np.concatenate([np.zeros(0, np.int64), *category_ids]),
        "name_counts": np.array([len(names) for record in records for names in record.names], np.int32),
        "name_rows": np.array(name_rows, np.int32),
        "names": _text(list(rows)),
        "categories": _text([[c.id, c.name, list(c.synonyms), c.frequency] for c in categories]),
    }


def unpack(arrays: Arrays, annotations: Path, root: Path, pictures: Pictures) -> Dataset:
    """The data set whose pictures are `pictures`, in the records' order; `root` stands before their names."""
    names = json.loads(arrays["names"].tobytes())
    distinct: dict[tuple[int, ...], tuple[str, ...]] = {}  # the same tuples of names, not one for every box
    ends = np.cumsum(arrays["name_counts"]).tolist()
    rows = arrays["name_rows"].tolist()
    box_names = []
    for start, end in zip([0, *ends], ends, strict=False):
        key = tuple(rows[start:end])
        if key not in distinct:
            distinct[key] = tuple(names[row] for row in key)
        box_names.append(distinct[key])
    files = json.loads(arrays["files"].tobytes())
    boxes, category_ids = arrays["boxes"], arrays["category_ids"]
    ends = np.cumsum(arrays["box_counts"]).tolist()
    columns = (arrays["image_ids"].tolist(), files, arrays["sizes"].tolist(), [0, *ends][:-1], ends)
    records = tuple(
        Record(
            image_id=image_id,
            path=root / file,
            width=width,
            height=height,
            boxes=boxes[start:end],
            names=tuple(box_names[start:end]),
            category_ids=category_ids[start:end],
            stored=Stored(pictures, number),
        )
        for number, (image_id, file, (width, height), start, end) in enumerate(zip(*columns, strict=True))
    )
    categories = tuple(
        Category(number, name, tuple(synonyms), frequency)
        for number, name, synonyms, frequency in json.loads(arrays["categories"].tobytes())
    )
    return Dataset(annotations, records, categories)


def checksum(arrays: Arrays) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape} ".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()


def _text(value: Any) -> UInt8[ndarray, "length"]:
    return np.frombuffer(json.dumps(value, separators=(",", ":")).encode(), np.uint8)


def read_prepared(folder: Path) -> Dataset:
    """The data set of a folder; its pictures are read from the shards. Raises AnnotationError."""
    if not (folder / COMPLETE).is_file():
        if (folder / WORK).is_dir():
            raise AnnotationError(f"{folder}: is not complete yet: run the command that prepares it again")
        raise AnnotationError(
            f"{folder}: is a folder, and not one that `python -m opendet_jax.data prepare` has written, nor YOLO's "
            "with a data.yaml, nor Pascal VOC's with Annotations or xml files; other annotations are a json"
        )
    try:
        with (folder / INDEX).open("rb") as file, np.load(file) as index:
            arrays = {name: index[name] for name in index.files}
        return unpack(arrays, folder / ANNOTATIONS, folder, Shards(folder))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise AnnotationError(f"{folder / INDEX}: is damaged: {error}") from error
