"""The annotations of a data set's images in LVIS v1's form, entry by entry."""

import io
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from opendet_jax.config import split_of
from opendet_jax.data.formats.json_source import PARTS
from opendet_jax.data.formats.json_stream import is_list, lists_of
from opendet_jax.data.formats.label_folders import label_form
from opendet_jax.data.formats.records import Dataset, Record
from opendet_jax.files import replacing


def lvis_form(dataset: Dataset, root: Path | None = None) -> Iterator[tuple[str, Iterable[Any]]]:
    """The lists "categories", "images" and "annotations", each to be used before the next is asked for.

    A json in LVIS's or COCO's form is given as it is (what cannot be used too), without segmentations. The records of
    other annotations are put into that form; `root` is the folder above their images.
    """
    return _described(dataset, root) if is_described(dataset) else _copied(dataset)


def is_described(dataset: Dataset) -> bool:
    """Whether `lvis_form` is made of the records: the annotations are not in that form themselves."""
    path, _ = split_of(dataset.annotations)
    return bool(label_form(path)) or is_list(path)


def write_annotations(dataset: Dataset, root: Path, out: Path) -> None:
    """One json of these lists."""
    with replacing(out) as part, part.open("w", encoding="utf-8") as file:
        separator = "{"
        for name, entries in lvis_form(dataset, root):
            file.write(f'{separator}"{name}": ')
            _write_list(file, entries)
            separator = ",\n"
        file.write("}\n")


def _write_list(file: io.TextIOBase, entries: Iterable[Any]) -> None:
    separator = "["
    for entry in entries:
        file.write(f"{separator}\n{json.dumps(entry)}")
        separator = ","
    file.write("]" if separator == "," else "[]")


def _copied(dataset: Dataset) -> Iterator[tuple[str, Iterable[Any]]]:
    kept = {record.image_id for record in dataset.records}
    wanted: dict[str, Callable[[Any], bool]] = {
        "images": lambda entry: entry["id"] in kept,
        "annotations": lambda entry: type(entry["image_id"]) is int and entry["image_id"] in kept,
        "categories": lambda entry: True,
    }
    for part, entries in lists_of(dataset.annotations):
        if part in PARTS:
            yield part, (_without_masks(entry) for entry in entries if wanted[part](entry))


def _without_masks(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key != "segmentation"}


def _described(dataset: Dataset, root: Path | None) -> Iterator[tuple[str, Iterable[Any]]]:
    yield "categories", ({"id": category.id, "name": category.name} for category in dataset.categories)
    yield (
        "images",
        (
            {
                "id": record.image_id,
                "file_name": (record.path.relative_to(root) if root else record.path).as_posix(),
                "width": record.width,
                "height": record.height,
            }
            for record in dataset.records
        ),
    )
    yield "annotations", _boxes(dataset)


def _boxes(dataset: Dataset) -> Iterator[dict[str, Any]]:
    numbers = itertools.count(1)
    for record in dataset.records:
        columns = (record.boxes.tolist(), record.names, record.category_ids.tolist())
        for corners, names, category_id in zip(*columns, strict=True):
            yield _box(next(numbers), record, corners, category_id) | {"names": list(names)}
        for corners, category_id in record.ignored:
            yield _box(next(numbers), record, corners, category_id) | {"iscrowd": 1}


def _box(number: int, record: Record, corners: Sequence[float], category_id: int) -> dict[str, Any]:
    x0, y0, x1, y1 = corners
    return {
        "id": number,
        "image_id": record.image_id,
        "category_id": category_id,
        "bbox": [x0, y0, x1 - x0, y1 - y0],
        "area": (x1 - x0) * (y1 - y0),
    }
