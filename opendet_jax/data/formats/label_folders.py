"""Folders with a file of boxes for each picture: YOLO's (data.yaml and text files) and Pascal VOC's (xml files).

Both have splits, of which one is read. What cannot be used is passed over and counted; docs/data.md has the table.
"""

import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, TreeBuilder, XMLParser

import yaml
from tqdm import tqdm

from opendet_jax.config import YAML, split_of
from opendet_jax.data.formats.image_folder import NamedPictures, files_below, labels_of, labels_of_none, lines_of
from opendet_jax.data.formats.json_source import readable_name
from opendet_jax.data.formats.json_stream import SHOWN_AFTER, AnnotationError
from opendet_jax.data.formats.records import (
    LARGEST_SIDE,
    AnnotationReader,
    Category,
    Corners,
    Dataset,
    Names,
    Problems,
    flag,
    image_id_of,
)
from opendet_jax.data.pixels import ImageError, upright_size

DATA_YAML = "data.yaml"
SPLITS = ("train", "val", "test", "minival")  # of a data.yaml
CLASS_LIST = "classes.txt"  # which labelImg writes beside its labels
ROUNDING = 1e-5  # of a side: edges that far beyond the border are rounded numbers, and lie on it
THREADS = 16  # that look at pictures: they wait for the disk
UNREADABLE = "picture without a readable size, to be taken for missing"
LEFT_OUT = "xml that cannot be used, its picture left out"
_NO_SIZE = (1, 1)  # of such a picture, whose boxes stay fractions; if it is read after all, its size is a wrong one


def label_form(path: Path) -> Literal["YOLO", "Pascal VOC", ""]:
    """What a path is: a data.yaml or the folder with it; a folder with xml files or with Annotations; or neither."""
    if os.path.isfile(path):
        return "YOLO" if path.suffix in YAML else ""
    if os.path.isfile(path / DATA_YAML):
        return "YOLO"
    return "Pascal VOC" if os.path.isdir(path / "Annotations") or any(path.glob("*.xml")) else ""


def read_labels(annotations: str | Path, images: str | Path, split: str) -> tuple[Dataset, Problems]:
    """The data set of a split of a folder that `label_form` knows, and what was passed over.

    `annotations` may name the split ("dogs/data.yaml:test"); otherwise it is `split`, or all of a VOC folder without
    ImageSets. `images`, which may be empty, is the folder that YOLO's `path` stands for, or that of VOC's pictures.
    Raises AnnotationError.
    """
    path, named = split_of(annotations)
    if images and not Path(images).is_dir():
        raise AnnotationError(f"{path}: images = {images} is no folder")
    if label_form(path) == "YOLO":
        return _read_yolo(path / DATA_YAML if path.is_dir() else path, images, named or split)
    return _read_voc(path, images, named, split)


def _read_yolo(path: Path, images: str | Path, split: str) -> tuple[Dataset, Problems]:
    problems, fields = Problems(), _fields(path)
    names = _class_names(path, fields)
    lines = _YoloLines(names, _keypoint_numbers(path, fields), problems)
    roots = [*([images] if images else []), path.parent / _text(path, fields, "path"), path.parent]
    pictures, folders = _pictures_of(path, fields, split, [Path(os.path.abspath(root)) for root in roots], problems)
    labels = labels_of(pictures)
    if not any(os.path.isfile(label) for label in labels):
        raise AnnotationError(f"{path}: {split}: no picture has a label file; looked for: {labels[0]}")
    for file in labels_of_none(folders, labels):
        boxes = sum(1 for _ in lines_of(file)) if file.name != CLASS_LIST else 0
        if boxes:
            problems.add("box in a label file without a picture", f"{file}: {boxes}", boxes)
    readers: dict[int, AnnotationReader] = {}
    used: set[Path] = set()
    with ThreadPoolExecutor(THREADS) as pool:
        sizes = [pool.submit(upright_size, picture) for picture in pictures]
        bar = tqdm(sizes, f"read {path}", leave=False, unit="image", delay=SHOWN_AFTER)
        for (picture, place), label, size in zip(pictures.items(), labels, bar, strict=True):
            try:
                reader = AnnotationReader(picture, *size.result())
            except ImageError as error:
                problems.add(UNREADABLE, str(error))
                reader = AnnotationReader(picture, *_NO_SIZE)
            readers[image_id_of(place, readers)] = reader
            if not os.path.isfile(label):
                problems.add("picture without a label file, taken as one without objects", f"{picture}: no {label}")
                continue
            if label in used:
                problems.add("label file of several pictures, its boxes taken for each", f"{label}: {picture.name}")
            used.add(label)
            for number, line in lines_of(label):
                lines.add(reader, line, f"{label}:{number}")
    records = tuple(reader.record(number) for number, reader in readers.items())
    categories = tuple(Category(number, name) for number, name in names.items())
    return Dataset(Path(f"{path}:{split}"), records, categories), problems


class _Texts(yaml.BaseLoader):
    """Values as they are written: "no" is a name, and 1.10 is not 1.1. A key that occurs twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        for key, times in Counter(str(key.value) for key, _ in node.value).items():
            if times > 1:
                raise yaml.constructor.ConstructorError(problem=f"{key!r} occurs twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def _fields(path: Path) -> dict[str, Any]:
    try:
        fields = _Texts(path.read_text(encoding="utf-8-sig")).get_single_data()  # dicts, lists and texts alone
    except OSError as error:
        raise AnnotationError(f"{path}: cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise AnnotationError(f"{path}: is not yaml: {' '.join(str(error).split())}") from error
    if not isinstance(fields, dict):
        raise AnnotationError(f"{path}: is not a data.yaml, which has the fields train, val and names")
    return fields


def _texts(path: Path, fields: Mapping[str, Any], name: str) -> list[str]:
    """Of a field with one text or a list of them; none where it is missing or empty."""
    value = fields.get(name, [])
    listed = value if isinstance(value, list) else [value]
    if not all(isinstance(one, str) for one in listed):
        raise AnnotationError(f"{path}: field {name!r} is {value!r:.80}, not a text or a list of texts")
    return [one for one in listed if one not in ("", "~", "null")]


def _text(path: Path, fields: Mapping[str, Any], name: str) -> str:
    return "".join(_texts(path, fields, name)[:1])


def _whole(text: str) -> int:
    """A whole number of up to 15 digits; −1 for anything else."""
    return int(text) if text.isdecimal() and len(text) < 16 else -1


def _class_names(path: Path, fields: Mapping[str, Any]) -> dict[int, str]:
    """Readable names by the number of their class."""
    value = fields.get("names")
    listed = value if isinstance(value, dict) else dict(enumerate(value)) if isinstance(value, list) else {}
    names: dict[int, str] = {}
    for key, name in listed.items():
        number = _whole(str(key))
        if number == -1 or number in names or not isinstance(name, str):
            raise AnnotationError(f"{path}: field 'names' has {key!r:.40}: {name!r:.40}, not a class's number and name")
        names[number] = readable_name(name)
    if not names:
        raise AnnotationError(f"{path}: field 'names' is {value!r:.80}, not names as a list or by their numbers")
    if _text(path, fields, "nc") not in ("", str(len(names))):
        raise AnnotationError(f"{path}: field 'nc' is {_text(path, fields, 'nc')}, but there are {len(names)} names")
    return dict(sorted(names.items()))


def _keypoint_numbers(path: Path, fields: Mapping[str, Any]) -> int:
    """How many numbers of key points stand behind a box."""
    shape = [_whole(side) for side in _texts(path, fields, "kpt_shape")]
    if shape and (len(shape) != 2 or min(shape) < 0):
        raise AnnotationError(f"{path}: field 'kpt_shape' is {fields['kpt_shape']}, not two whole numbers")
    return math.prod(shape) if shape else 0


def _pictures_of(
    path: Path, fields: Mapping[str, Any], split: str, roots: Sequence[Path], problems: Problems
) -> tuple[dict[Path, str], list[Path]]:
    """The pictures of a split, each with its place as data.yaml has it; the folders that belong to it as a whole."""
    there = {name: _texts(path, fields, name) for name in SPLITS}
    there["val"] = there["val"] or _texts(path, fields, "validation")
    if not there.get(split):
        raise AnnotationError(_no_split(path, split, [name for name, places in there.items() if places]))
    pictures: dict[Path, str] = {}
    folders = []
    for place in there[split]:
        own = Path(place.removeprefix("../"))  # Roboflow has one too many
        tried = [root / one for root in roots for one in (place, own)]
        found = next((Path(os.path.abspath(one)) for one in tried if os.path.exists(one)), None)
        if found is None or (found.is_file() and found.suffix != ".txt"):
            looked = ", ".join(dict.fromkeys(map(str, [found] if found else tried)))
            raise AnnotationError(f"{path}: {split}: {place!r} is no folder, and no .txt that lists pictures: {looked}")
        if found.is_dir():
            folders.append(found)
            named = [(file, str(own / file.relative_to(found))) for file in files_below(found)]
        else:
            named = _listed(found, roots)
        for picture, name in named:
            if picture in pictures:
                problems.add("picture that is named twice, taken once", str(picture))
            pictures.setdefault(picture, name)
    if not pictures:
        raise AnnotationError(f"{path}: {split}: there is no picture in {', '.join(there[split])}")
    return pictures, folders


def _no_split(path: Path, split: str, there: Sequence[str]) -> str:
    known = f"; there are: {', '.join(there)}, to be named as {path}:{there[0]}" if there else ", nor any other"
    return f"{path}: has no split {split!r}{known}"


def _listed(path: Path, roots: Sequence[Path]) -> Iterator[tuple[Path, str]]:
    """The pictures that a text names, one a line, and the line. Of one that is missing the place where it should be."""
    for _, line in lines_of(path):
        tried = [root / name for name in (line, line.replace("\\", "/")) for root in (path.parent, *roots)]
        found = next((one for one in tried if os.path.isfile(one)), tried[len(tried) // 2])
        yield Path(os.path.abspath(found)), str(Path(line))


class _YoloLines:
    """Adds a line's box to its picture, or counts why not."""

    def __init__(self, names: Mapping[int, str], keypoints: int, problems: Problems):
        self._classes, self._keypoints, self._problems = names, keypoints, problems
        self._names = Names()

    def add(self, reader: AnnotationReader, line: str, where: str) -> None:
        said = f"{where}: {line:.80}"
        try:
            class_, *numbers = map(float, line.split())
        except ValueError:
            return self._problems.add("line that is not of numbers", said)
        if not all(map(math.isfinite, numbers)):
            return self._problems.add("box is not four finite numbers", said)
        corners = self._corners(numbers, said)
        if corners is None:
            return None
        if class_ not in self._classes:
            return self._problems.add("unknown category id", said)
        names = self._names((self._classes[int(class_)],), self._problems, where)
        if names:
            on_border = (0.0 if -ROUNDING <= v < 0 else 1.0 if 1 < v <= 1 + ROUNDING else v for v in corners)
            x0, y0, x1, y1 = (v * side for v, side in zip(on_border, (reader.width, reader.height) * 2, strict=True))
            reader.add_corners((x0, y0, x1, y1), names, int(class_), self._problems, said)
        return None

    def _corners(self, numbers: Sequence[float], said: str) -> Corners | None:
        """x0, y0, x1, y1 as shares of the sides; None, and counted, where a line has neither a box nor a polygon."""
        if len(numbers) in (4, 4 + self._keypoints):
            x, y, w, h = numbers[:4]
            return x - w / 2, y - h / 2, x + w / 2, y + h / 2
        if len(numbers) < 6 or len(numbers) % 2:
            six = "line of six numbers: a rotated box, or one with a score"
            return self._problems.add(six if len(numbers) == 5 else "line that is no box", said)
        kind = "four corners, of a polygon or a rotated box" if len(numbers) == 8 else "polygon"
        self._problems.add(f"{kind}: its extent taken", said)
        return min(numbers[::2]), min(numbers[1::2]), max(numbers[::2]), max(numbers[1::2])


def _read_voc(path: Path, images: str | Path, named: str, split: str) -> tuple[Dataset, Problems]:
    problems = Problems()
    folder = path / "Annotations" if (path / "Annotations").is_dir() else path
    root = folder.parent if folder.name == "Annotations" else folder
    sets = {file.stem: file for file in sorted((root / "ImageSets" / "Main").glob("*.txt"))}
    split = named or (split if sets else "")
    if split and split not in sets:
        raise AnnotationError(_no_split(path, split, [name for name in sets if not name.endswith(("_train", "_val"))]))
    if split:
        places = _voc_places(sets[split])
    else:
        places = [file.relative_to(folder).with_suffix("") for file in files_below(folder, ["xml"])]
    finder = NamedPictures([*([Path(images)] if images else []), root / "JPEGImages", root / "images", root], problems)
    readers: dict[int, AnnotationReader] = {}
    names = Names()
    for place in tqdm(places, f"read {path}", leave=False, unit="image", delay=SHOWN_AFTER):
        file = folder / f"{place}.xml"
        try:
            found = _parse(file)
            reader = _voc_reader(found, finder.find(place, found.findtext("filename") or ""), file, problems)
        except (AnnotationError, ImageError) as error:
            problems.add(LEFT_OUT, str(error))
            continue
        readers[image_id_of(place.as_posix(), readers)] = reader
        for i, described in enumerate(found.findall("object")):
            _add_voc_object(reader, described, names, problems, f"{file}: object[{i}]")
    every_name = sorted({name for reader in readers.values() for name in reader.every_name()})
    category_of = {name: number for number, name in enumerate(every_name, 1)}
    records = tuple(reader.record(number, category_of) for number, reader in readers.items())
    if not records:
        raise AnnotationError(f"{path}: none of the {len(places)} xml files can be used: {problems}")
    categories = tuple(Category(number, name) for name, number in category_of.items())
    return Dataset(Path(f"{path}:{split}") if split else path, records, categories), problems


def _voc_places(file: Path) -> list[Path]:
    """The xml files of a split, as their folder has them, without their ending."""
    places = list(dict.fromkeys(Path(line) for _, line in lines_of(file)))
    for place in places:
        if place.is_absolute() or ".." in place.parts or not place.name:
            raise AnnotationError(f"{file}: {str(place)!r} is not a name inside the folder of the xml files")
    return places


class _Tree(TreeBuilder):
    """Refuses a DOCTYPE, which no annotation needs: entities that grow without end and other files are named there."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise ValueError(f"has a DOCTYPE, {name!r:.40}")


def _parse(file: Path) -> Element:
    """An xml file's <annotation>. Raises AnnotationError."""
    try:
        found = ElementTree.parse(file, XMLParser(target=_Tree())).getroot()
    except (OSError, SyntaxError, ValueError, LookupError) as error:  # the last: an encoding that is not known
        raise AnnotationError(f"{file}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if found.tag != "annotation":
        raise AnnotationError(f"{file}: is <{found.tag}>, not <annotation>")
    return found


def _voc_reader(found: Element, picture: Path, file: Path, problems: Problems) -> AnnotationReader:
    """Of the size that the xml says, or the picture has where it says 0 or none. Raises AnnotationError, ImageError."""
    written = [(found.findtext(f"size/{name}") or "0").strip() for name in ("width", "height")]
    width, height = map(_whole, written)
    if width == height == 0:
        problems.add("xml without a size, the picture's taken", str(file))
        width, height = upright_size(picture)
    if not (0 < width <= LARGEST_SIDE and 0 < height <= LARGEST_SIDE):
        raise AnnotationError(f"{file}: its size is {'×'.join(written):.40}")
    return AnnotationReader(picture, width, height)


def _add_voc_object(reader: AnnotationReader, described: Element, known: Names, problems: Problems, where: str) -> None:
    """Its box is xmin − 1 … xmax, as VOC counts pixels from 1 and the last one belongs to the box."""
    name = described.findtext("name") or ""
    where = f"{where} ({name.strip():.40})"
    names = known((readable_name(name),), problems, where)
    boxes, parts = described.findall("bndbox"), described.findall("part")
    if parts:
        problems.add("part of an object, left out", where, len(parts))
    if not boxes:
        rotated = described.find("robndbox") is not None
        problems.add("rotated box, left out" if rotated else "object without a box, left out", where)
    ignored = flag({"difficult": described.findtext("difficult")}, "difficult", problems, where)
    for box in boxes if names else []:
        written = [(box.findtext(side) or "").strip() for side in ("xmin", "ymin", "xmax", "ymax")]
        said = f"{where}: {', '.join(written):.80}"
        try:
            x0, y0, x1, y1 = map(float, written)
        except ValueError:
            x0 = y0 = x1 = y1 = math.nan
        reader.add_corners((x0 - 1, y0 - 1, x1, y1), names, 0, problems, said, ignored)
