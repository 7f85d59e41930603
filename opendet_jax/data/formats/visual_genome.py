"""Visual Genome as published: objects.json, and image_data.json beside it (docs/data.md has where they come from)."""

from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opendet_jax.data.formats.image_folder import ImageFolder
from opendet_jax.data.formats.json_source import count_repeated, count_repeated_files, field_of, integer, side, text
from opendet_jax.data.formats.json_stream import AnnotationError, lists_of
from opendet_jax.data.formats.records import AnnotationReader, Category, Dataset, Names, Problems

IMAGE_DATA = "image_data.json"


@dataclass(slots=True)
class _Image:
    path: Path
    width: int
    height: int


def read_visual_genome(annotations: str | Path, images: str | Path) -> tuple[Dataset, Problems]:
    """The data set of an objects.json and the folder of its images, and what was passed over.

    The images are those of objects.json, in its order. A box's names are its "names". There are no categories in
    Visual Genome: here each name is one, with its place among the sorted names as id (from 1), and a box is of the
    category of its first name. An image that occurs again adds its objects to the first.
    Raises AnnotationError.
    """
    path, problems = Path(annotations), Problems()
    sizes = _read_image_data(path, ImageFolder(images), problems)
    reader = _Entries(path, sizes, problems)
    for part, entries in lists_of(path):
        if part == "":
            for i, entry in enumerate(entries):
                reader.add(f"[{i}]", entry)
    count_repeated(reader.ids, problems, "object id")
    count_repeated_files(reader.images, problems)
    every_name = sorted({name for objects in reader.images.values() for names in objects.names for name in names})
    category_of = {name: number for number, name in enumerate(every_name, 1)}
    records = tuple(objects.record(image_id, category_of) for image_id, objects in reader.images.items())
    return Dataset(path, records, tuple(Category(number, name) for name, number in category_of.items())), problems


def _id_field(entry: Any, name: str) -> str:
    """Version 1.0 calls every id "id"."""
    return "id" if isinstance(entry, dict) and name not in entry and "id" in entry else name


def _read_image_data(path: Path, folder: ImageFolder, problems: Problems) -> Mapping[int, _Image]:
    source = path.parent / IMAGE_DATA
    if not source.is_file():
        raise AnnotationError(
            f"{path}: is a list, as Visual Genome's objects.json; the sizes of its images are in {IMAGE_DATA}, "
            f"which is not beside it"
        )
    found: dict[int, _Image] = {}
    for part, entries in lists_of(source):
        if part:
            raise AnnotationError(f"{source}: is not a list of images")
        for i, entry in enumerate(entries):
            number = integer(source, f"[{i}]", entry, _id_field(entry, "image_id"))
            where = f"[{i}] (image {number})"
            width, height = (side(source, where, entry, name) for name in ("width", "height"))
            url = text(source, where, entry, "url")
            image = _Image(folder.find("", url, f"{source}: {where}"), width, height)
            if found.setdefault(number, image) != image:
                raise AnnotationError(f"{source}: {where}: the id occurs twice, with different contents")
    folder.settle(found.values(), problems)
    return found


class _Entries:
    """The entries of objects.json: an image each."""

    def __init__(self, path: Path, sizes: Mapping[int, _Image], problems: Problems):
        self._path, self._sizes, self._problems = path, sizes, problems
        self._names = Names()
        self.images: dict[int, AnnotationReader] = {}
        self.ids = array("q")

    def add(self, where: str, entry: Any) -> None:
        image_id = integer(self._path, where, entry, _id_field(entry, "image_id"))
        where = f"{where} (image {image_id})"
        listed = field_of(self._path, where, entry, "objects")
        if not isinstance(listed, list):
            raise AnnotationError(f"{self._path}: {where}: field 'objects' is {listed!r:.40}, not a list")
        if image_id not in self._sizes:
            self._problems.add(f"image that is not in {IMAGE_DATA}", where)
            if listed:
                self._problems.add(f"object of an image that is not in {IMAGE_DATA}", where, len(listed))
            return
        if image_id in self.images:
            self._problems.add("repeated image, its objects added to the first", where)
        image = self._sizes[image_id]
        objects = self.images.setdefault(image_id, AnnotationReader(image.path, image.width, image.height))
        for i, described in enumerate(listed):
            self._add_object(objects, f"{where}.objects[{i}]", described)

    def _add_object(self, objects: AnnotationReader, where: str, described: Any) -> None:
        number = integer(self._path, where, described, _id_field(described, "object_id"))
        self.ids.append(number)
        where = f"{where} (object {number})"
        bbox = [field_of(self._path, where, described, name) for name in ("x", "y", "w", "h")]
        written = field_of(self._path, where, described, "names")
        if not isinstance(written, list) or not all(isinstance(name, str) for name in written):
            raise AnnotationError(f"{self._path}: {where}: field 'names' is {written!r:.40}, not a list of strings")
        names = self._names(written, self._problems, where)
        if names:
            objects.add(bbox, names, 0, self._problems, where)  # categories are known when all names are
