"""Annotations in the json forms of LVIS v1 and COCO: these two, Objects365, Visual Genome as GenerateU has it, scenes.

Missing files, broken json and missing fields are errors that name file, entry and field. Single annotations that
cannot be used are passed over, counted and reported; docs/data.md has the table.
"""

from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from opendet_jax.data.formats.image_folder import ImageFolder, url_folder
from opendet_jax.data.formats.json_stream import AnnotationError, lists_of
from opendet_jax.data.formats.records import (
    LARGEST_SIDE,
    AnnotationReader,
    Category,
    Dataset,
    Names,
    Problems,
    clean_text,
    flag,
    frequency,
    written_names,
)

PARTS = ("images", "annotations", "categories")
NAME_FIELDS = ("names", "caption_with_token", "object_name", "caption")  # of an annotation; the first that is there
MINIVAL_FOLDER = "val2017"  # of COCO's; LVIS's val has images of train2017 too
NO_CLASS = -1  # in results: a name that is no class
_INT64 = range(-(2**63), 2**63)


def read_json(
    annotations: str | Path, images: str | Path, name_field: str = "", minival: bool = False
) -> tuple[Dataset, Problems]:
    """The data set of a json and the folder of its images (whose files are not opened here), and what was passed over.

    A box's names are those in the `name_field` of its annotation (default: the first of NAME_FIELDS that it has), a
    list or comma-separated, where it has that field, otherwise its category's name with underscores as spaces. An
    optional field that is null is absent.
    `minival` keeps the images whose coco_url lies in COCO's val2017. The json is read twice, entry by entry, so that
    memory holds the records only.
    Raises AnnotationError.
    """
    path, problems = Path(annotations), Problems()
    header = _read_header(path, ImageFolder(images), minival, problems)
    fields = (name_field,) if name_field else NAME_FIELDS
    reader = _Annotations(path, header, fields, problems)
    for part, entries in lists_of(path):
        if part == "annotations":
            reader.read(entries)
    if name_field and reader.nameless and not reader.named:
        raise AnnotationError(f"{path}: no annotation has the field {name_field!r} that names are to come from")
    records = tuple(objects.record(image_id) for image_id, objects in header.images.items())
    return Dataset(path, records, tuple(header.categories.values())), problems


def place(part: str, index: int, entry: Any) -> str:
    """How messages name an entry: "images[3] (id 17)"."""
    known = isinstance(entry, dict) and "id" in entry
    return f"{part}[{index}] (id {entry['id']!r:.40})" if known else f"{part}[{index}]"


def field_of(path: Path, where: str, entry: Any, name: str) -> Any:
    """A field that must be there; `where` is the entry's `place`."""
    if not isinstance(entry, dict) or name not in entry:
        raise AnnotationError(f"{path}: {where} has no field {name!r}")
    return entry[name]


def integer(path: Path, where: str, entry: Any, name: str) -> int:
    value = field_of(path, where, entry, name)
    if isinstance(value, bool) or not isinstance(value, int) or value not in _INT64:
        raise AnnotationError(f"{path}: {where}: field {name!r} is {value!r:.40}, not an integer")
    return value


def text(path: Path, where: str, entry: Any, name: str) -> str:
    value = field_of(path, where, entry, name)
    if not isinstance(value, str):
        raise AnnotationError(f"{path}: {where}: field {name!r} is {value!r:.40}, not a string")
    return value


def side(path: Path, where: str, entry: Any, name: str) -> int:
    """A width or a height."""
    value = integer(path, where, entry, name)
    if value < 1:
        raise AnnotationError(f"{path}: {where}: field {name!r} is not positive")
    if value > LARGEST_SIDE:
        raise AnnotationError(f"{path}: {where}: field {name!r} is {value}, more than {LARGEST_SIDE} pixels")
    return value


def readable_name(name: str) -> str:
    """ "bus_(vehicle)" → "bus (vehicle)"."""
    return clean_text(name.replace("_", " "))


@dataclass
class _Header:
    """Everything but the annotations."""

    categories: dict[int, Category] = field(default_factory=dict)
    images: dict[int, AnnotationReader] = field(default_factory=dict)
    left_out: set[int] = field(default_factory=set)  # by minival


def _read_header(path: Path, folder: ImageFolder, minival: bool, problems: Problems) -> _Header:
    header, parts = _Header(), set()
    for part, entries in lists_of(path):
        parts.add(part)
        if part == "categories":
            _add_categories(path, entries, header, problems)
        elif part == "images":
            _add_images(path, folder, entries, header, minival, problems)
    folder.settle(header.images.values(), problems)
    for part in PARTS:
        if part not in parts:
            raise AnnotationError(f"{path}: has no list {part!r}")
    count_repeated_files(header.images, problems)
    return header


def _add_categories(path: Path, entries: Iterable[Any], header: _Header, problems: Problems) -> None:
    for i, entry in enumerate(entries):
        where = place("categories", i, entry)
        number = integer(path, where, entry, "id")
        if number == NO_CLASS:
            raise AnnotationError(f"{path}: {where}: field 'id' is −1, which stands for names that are no class")
        name = readable_name(text(path, where, entry, "name"))
        category = Category(number, name, _synonyms(path, where, entry), frequency(entry, problems, where))
        if header.categories.setdefault(number, category) is not category:
            _repeated(path, where, header.categories[number] == category, problems, "category")


def _synonyms(path: Path, where: str, entry: Mapping[str, Any]) -> tuple[str, ...]:
    """Without nulls and empty ones."""
    value = entry.get("synonyms")
    listed = [] if value is None else value
    if not isinstance(listed, list) or not all(synonym is None or isinstance(synonym, str) for synonym in listed):
        raise AnnotationError(f"{path}: {where}: field 'synonyms' is {value!r:.40}, not a list of strings")
    return tuple(clean for synonym in listed if synonym is not None and (clean := readable_name(synonym)))


def _repeated(path: Path, where: str, same: bool, problems: Problems, what: str) -> None:
    if not same:
        raise AnnotationError(f"{path}: {where}: the id occurs twice, with different contents")
    problems.add(f"repeated {what}", where)


def _add_images(
    path: Path, folder: ImageFolder, entries: Iterable[Any], header: _Header, minival: bool, problems: Problems
) -> None:
    for i, entry in enumerate(entries):
        where = place("images", i, entry)
        number = integer(path, where, entry, "id")
        width, height = (side(path, where, entry, name) for name in ("width", "height"))
        named, linked = (entry.get(name) is not None for name in ("file_name", "coco_url"))
        if not named and not linked:
            raise AnnotationError(f"{path}: {where} has no field 'file_name' and no 'coco_url'")
        url = text(path, where, entry, "coco_url") if linked or minival else ""
        name = text(path, where, entry, "file_name") if named else ""
        if named and not name:
            raise AnnotationError(f"{path}: {where}: '' is not a path inside the image folder")
        objects = AnnotationReader(folder.find(name, url, f"{path}: {where}"), width, height)
        if minival and url_folder(url) != MINIVAL_FOLDER:
            header.left_out.add(number)
            continue
        known = header.images.setdefault(number, objects)
        if known is not objects:
            same = (known.path, known.width, known.height) == (objects.path, width, height)
            _repeated(path, where, same, problems, "image")


class _Annotations:
    """Adds each usable annotation to its image, in the json's order."""

    def __init__(self, path: Path, header: _Header, fields: Sequence[str], problems: Problems):
        self._path, self._header, self._fields, self._problems = path, header, fields, problems
        self._names = Names()
        self.named, self.nameless = 0, 0  # annotations with one of the fields, with none

    def read(self, entries: Iterable[Any]) -> None:
        ids = array("q")
        for i, entry in enumerate(entries):
            self._add(place("annotations", i, entry), entry)
            number = entry.get("id")
            if type(number) is int and number in _INT64:
                ids.append(number)
        count_repeated(ids, self._problems, "annotation id")

    def _add(self, where: str, entry: Any) -> None:
        image_id, category_id, bbox = (
            field_of(self._path, where, entry, name) for name in ("image_id", "category_id", "bbox")
        )
        if type(image_id) is int and image_id in self._header.left_out:
            return
        if type(image_id) is not int or image_id not in self._header.images:
            self._problems.add("unknown image id", f"{where}: {image_id!r:.40}")
        elif type(category_id) is not int or category_id not in self._header.categories:
            self._problems.add("unknown category id", f"{where}: {category_id!r:.40}")
        elif flag(entry, "iscrowd", self._problems, where):
            self._problems.add("crowd region", where)
        elif names := self._names_of(where, entry, category_id):
            self._header.images[image_id].add(bbox, names, category_id, self._problems, where)

    def _names_of(self, where: str, entry: Mapping[str, Any], category_id: int) -> tuple[str, ...]:
        """Empty, and counted, where there is none."""
        value = next((entry[name] for name in self._fields if entry.get(name) is not None), None)
        if value is None:
            self.nameless += 1
            return self._names((self._header.categories[category_id].name,), self._problems, where)
        self.named += 1
        written = written_names(value)
        if written is None:
            self._problems.add("name is not text", f"{where}: {value!r:.40}")
            return ()
        return self._names(written, self._problems, where)


def count_repeated_files(images: Mapping[int, AnnotationReader], problems: Problems) -> None:
    """Files that are the picture of several image ids, which are kept."""
    names = np.fromiter((hash(objects.path.name) for objects in images.values()), np.int64, len(images))
    values, counts = np.unique(names, return_counts=True)
    again = set(values[counts > 1].tolist())  # few: paths are compared for these only
    first: dict[Path, int] = {}
    for image_id, objects in images.items():
        if again and hash(objects.path.name) in again:
            other = first.setdefault(objects.path, image_id)
            if other != image_id:
                problems.add("file of another image id too, image kept", f"{objects.path}: images {other}, {image_id}")


def count_repeated(ids: array, problems: Problems, what: str) -> None:
    """Ids that occur again: their boxes are kept, as no part of this program goes by these ids."""
    values, counts = np.unique(np.frombuffer(ids, np.int64) if ids else np.zeros(0, np.int64), return_counts=True)
    for value, count in zip(values[counts > 1].tolist(), counts[counts > 1].tolist(), strict=True):
        problems.add(f"repeated {what}, box kept", f"{value}", count - 1)
