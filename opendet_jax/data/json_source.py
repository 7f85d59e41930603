"""Annotations in the json forms of LVIS v1 and COCO (and of the generated scenes, which are LVIS).

Missing files, broken json and missing fields are errors that name file, entry and field. Single annotations that
cannot be used are passed over, counted and reported; docs/data.md has the table.
"""

import json
import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from opendet_jax.data.records import Category, Dataset, Problems, Record
from opendet_jax.errors import InputError

PARTS = ("images", "annotations", "categories")


class AnnotationError(InputError):
    """A json that cannot be used: the message names the file, the entry and the field."""


def read_json(annotations: str | Path, images: str | Path) -> tuple[Dataset, Problems]:
    """The data set of a json and the folder of its images (whose files are not opened here), and what was passed over.

    A box's names are its annotation's comma-separated "caption" where there is one (as in Visual Genome's json),
    otherwise its category's name with underscores as spaces.
    Raises AnnotationError.
    """
    path, root = Path(annotations), Path(images)
    content = _content(path)
    problems = Problems()
    categories = _categories(path, content["categories"])
    entries = _image_entries(path, content["images"])
    objects = _objects(path, content["annotations"], categories, entries, problems)
    return Dataset(path, _records(path, root, entries, objects), tuple(categories.values())), problems


def _content(path: Path) -> Mapping[str, list[Any]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise AnnotationError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:  # of json or of UTF-8
        raise AnnotationError(f"{path}: is not json: {error}") from error
    for field in PARTS:
        if not isinstance(content, dict) or not isinstance(content.get(field), list):
            raise AnnotationError(f"{path}: has no list {field!r}")
    return {field: content[field] for field in PARTS}


def _field(path: Path, where: str, entry: Any, field: str) -> Any:
    """A field that must be there; `where` says which entry it belongs to."""
    if not isinstance(entry, dict) or field not in entry:
        described = f" (id {entry['id']})" if isinstance(entry, dict) and "id" in entry else ""
        raise AnnotationError(f"{path}: {where}{described} has no field {field!r}")
    return entry[field]


def _integer(path: Path, where: str, entry: Any, field: str) -> int:
    value = _field(path, where, entry, field)
    if isinstance(value, bool) or not isinstance(value, int):
        raise AnnotationError(f"{path}: {where}: field {field!r} is {value!r}, not an integer")
    return value


def _text(path: Path, where: str, entry: Any, field: str) -> str:
    value = _field(path, where, entry, field)
    if not isinstance(value, str):
        raise AnnotationError(f"{path}: {where}: field {field!r} is {value!r}, not a string")
    return value


def readable_name(name: str) -> str:
    """ "bus_(vehicle)" → "bus (vehicle)"."""
    return name.replace("_", " ").strip()


def _categories(path: Path, entries: list[Any]) -> dict[int, Category]:
    found: dict[int, Category] = {}
    for i, entry in enumerate(entries):
        where = f"categories[{i}]"
        number = _integer(path, where, entry, "id")
        if number in found:
            raise AnnotationError(f"{path}: {where}: id {number} occurs twice")
        name = readable_name(_text(path, where, entry, "name"))
        synonyms = tuple(readable_name(str(s)) for s in entry.get("synonyms") or ())
        found[number] = Category(number, name, synonyms, str(entry.get("frequency", "")))
    return found


def _image_entries(path: Path, entries: list[Any]) -> dict[int, Mapping[str, Any]]:
    found: dict[int, Mapping[str, Any]] = {}
    for i, entry in enumerate(entries):
        where = f"images[{i}]"
        number = _integer(path, where, entry, "id")
        if number in found:
            raise AnnotationError(f"{path}: {where}: id {number} occurs twice")
        for field in ("width", "height"):
            if _integer(path, where, entry, field) < 1:
                raise AnnotationError(f"{path}: {where} (id {number}): field {field!r} is not positive")
        if "file_name" not in entry and "coco_url" not in entry:
            raise AnnotationError(f"{path}: {where} (id {number}) has no field 'file_name' and no 'coco_url'")
        found[number] = entry
    return found


def _image_path(path: Path, root: Path, entry: Mapping[str, Any]) -> Path:
    """The file of an image entry, which must lie under `root`.

    LVIS gives only a coco_url; its pictures lie in `root` itself or, as its splits mix COCO's, in train2017 and val2017
    under `root`.
    """
    where = f"image id {entry['id']}"
    if "file_name" in entry:
        relative = PurePosixPath(_text(path, where, entry, "file_name"))
    else:
        url = PurePosixPath(urlsplit(_text(path, where, entry, "coco_url")).path)
        below = root / url.parent.name
        relative = (
            PurePosixPath(url.parent.name, url.name) if below != root and below.is_dir() else PurePosixPath(url.name)
        )
    if relative.is_absolute() or ".." in relative.parts or not relative.name:
        raise AnnotationError(f"{path}: {where}: {str(relative)!r} is not a path inside the image folder")
    return root / relative


_Object = tuple[tuple[float, float, float, float], tuple[str, ...], int]  # corners, names, category id


def _objects(
    path: Path,
    annotations: list[Any],
    categories: Mapping[int, Category],
    images: Mapping[int, Mapping[str, Any]],
    problems: Problems,
) -> Mapping[int, list[_Object]]:
    """The usable annotations of each image, in the json's order."""
    found: dict[int, list[_Object]] = defaultdict(list)
    for i, entry in enumerate(annotations):
        where = f"annotations[{i}]"
        image_id, category_id = (_field(path, where, entry, field) for field in ("image_id", "category_id"))
        bbox = _field(path, where, entry, "bbox")
        label = f"{where} (id {entry['id']})" if "id" in entry else where
        if image_id not in images:
            problems.add("unknown image id", f"{label}: {image_id}")
            continue
        if category_id not in categories:
            problems.add("unknown category id", f"{label}: {category_id}")
            continue
        if entry.get("iscrowd"):
            problems.add("crowd region", label)
            continue
        names = _names(entry, categories[category_id])
        if not names:
            problems.add("empty name", label)
            continue
        corners = _corners(bbox, images[image_id], problems, label)
        if corners is not None:
            found[image_id].append((corners, names, category_id))
    return found


def _names(entry: Mapping[str, Any], category: Category) -> tuple[str, ...]:
    if "caption" not in entry:
        return (category.name,) if category.name else ()
    parts = (part.strip() for part in str(entry["caption"] or "").split(","))
    return tuple(part for part in parts if part)


def _corners(
    bbox: Any, image: Mapping[str, Any], problems: Problems, label: str
) -> tuple[float, float, float, float] | None:
    """x, y, w, h → corners clipped to the image, or None with the reason in `problems`."""
    numbers = isinstance(bbox, list) and all(isinstance(v, int | float) and math.isfinite(v) for v in bbox)
    if not numbers or len(bbox) != 4:
        problems.add("box is not four finite numbers", f"{label}: {bbox}")
        return None
    x, y, w, h = (float(v) for v in bbox)
    if w <= 0 or h <= 0:
        problems.add("box without area", f"{label}: {bbox}")
        return None
    width, height = image["width"], image["height"]
    x0, y0, x1, y1 = max(x, 0.0), max(y, 0.0), min(x + w, float(width)), min(y + h, float(height))
    if x1 <= x0 or y1 <= y0:
        problems.add("box outside its image", f"{label}: {bbox} in {width}×{height}")
        return None
    if (x0, y0, x1, y1) != (x, y, x + w, y + h):
        problems.add("box clipped to its image", f"{label}: {bbox} in {width}×{height}")
    return x0, y0, x1, y1


def _records(
    path: Path, root: Path, entries: Mapping[int, Mapping[str, Any]], objects: Mapping[int, list[_Object]]
) -> tuple[Record, ...]:
    return tuple(
        Record(
            image_id=number,
            path=_image_path(path, root, entry),
            width=entry["width"],
            height=entry["height"],
            boxes=np.array([corners for corners, _, _ in objects.get(number, ())], np.float32).reshape(-1, 4),
            names=tuple(names for _, names, _ in objects.get(number, ())),
            category_ids=np.array([category for _, _, category in objects.get(number, ())], np.int64),
        )
        for number, entry in entries.items()
    )
