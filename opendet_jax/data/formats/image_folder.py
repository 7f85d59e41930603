"""Where the pictures of a data set lie below a folder: those of a json however their archives were unpacked."""

import os
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from functools import cache
from pathlib import Path, PurePosixPath
from typing import NamedTuple, Protocol, TypeAlias, runtime_checkable
from urllib.parse import urlsplit

from opendet_jax.data.formats.json_stream import AnnotationError
from opendet_jax.data.formats.records import Problems
from opendet_jax.data.pixels import has_size

VISUAL_GENOME = ("VG_100K", "VG_100K_2")  # its two archives
PICTURES = frozenset(
    ("avif", "bmp", "gif", "jfif", "jp2", "jpe", "jpeg", "jpg", "mpo", "png", "ppm", "tif", "tiff", "webp")
)
MEASURED = 10_000  # files found without their folders whose size is looked at; of more, an even sample


def url_folder(url: str) -> str:
    """The last folder of a url: "val2017" of "http://images.cocodataset.org/val2017/000000000139.jpg"."""
    return PurePosixPath(urlsplit(url).path).parent.name


@runtime_checkable
class Picture(Protocol):
    """An entry of the json."""

    path: Path
    width: int
    height: int


_Claims: TypeAlias = dict[str, dict[str, Path | None]]  # by folder and name


class _Place(NamedTuple):
    written: Path  # a folder that the json names
    there: Path  # the one on the disk, with folders left out where it is another
    sure: bool  # of those only folders that the root lies in


class ImageFolder:
    """Finds pictures by looking at folders, each once; at files only where folders had to be left out.

    A picture named "a/b/c.jpg" lies in a/b where that exists, one named "c.jpg" alone in the last folder of its url
    where that exists, in one of Visual Genome's two, or in the root. Where a/b does not exist, the picture may lie in b
    or in the root: which pictures do is decided when all are known (`settle`). Backslashes are slashes, unless the root
    holds a file with such a name.
    """

    def __init__(self, root: str | Path):
        self.root = Path(root)
        self._place = cache(self._find_place)
        self._is_folder = cache(lambda name: (self.root / name).is_dir())
        self._visual_genome = cache(self._list_visual_genome)
        self._with_backslashes = cache(self._list_with_backslashes)
        self._left_out: dict[str, _Place] = {}  # by the folder that is written
        # By whether they are sure: for each file there the folder of its picture, None where it may be several.
        self._claims: dict[bool, _Claims] = {True: defaultdict(dict), False: defaultdict(dict)}

    def find(self, name: str, url: str, where: str) -> Path:
        """The path of a picture by its file name, or by its url alone where `name` is empty.

        Where folders are left out, it is the path that the json says, until `settle` has been called.
        Raises AnnotationError, which begins with `where`, where that is not below the root.
        """
        relative = self._relative(name or PurePosixPath(urlsplit(url).path).name, where)
        folder = relative.parent
        if not folder.parts:
            of_url = url_folder(url)
            if of_url in ("", "..") or (name and not self._is_folder(of_url)):
                return self.root / self._visual_genome().get(relative.name, "") / relative.name
            folder = PurePosixPath(of_url)
        place = self._place(folder)
        if place.there != place.written:
            self._left_out[str(place.written)] = place
            claims = self._claims[place.sure][self._there(place, relative.name)]
            if claims.setdefault(relative.name, place.written) != place.written:
                claims[relative.name] = None
        return place.written / relative.name

    def settle(self, pictures: Collection[Picture], problems: Problems) -> None:
        """Where folders were left out, sets the path to the file that can be this picture only, and has its size.

        The others are missing: they stay where the json says that they are, and `problems` has them. Of more than
        MEASURED pictures an even sample is measured here; the rest show when they are read, as every picture does.
        """
        if not self._left_out:
            return
        left_out = []
        for picture in pictures:
            folder, name = os.path.split(picture.path)
            folder = folder or "."
            if folder in self._left_out:
                left_out.append((picture, self._left_out[folder], name))
            for claims in self._claims.values():  # a file that is a picture by its full name is no other
                if folder in claims:
                    claims[folder][name] = None
        step = max(1, -(-len(left_out) // MEASURED))
        for number, (picture, place, name) in enumerate(left_out):
            there = self._there(place, name)
            sure, maybe = (self._claims[kind].get(there, {}) for kind in (True, False))
            # In what is surely another folder of the json lie others' pictures; Visual Genome's two are often one.
            others = sure and not place.sure and place.written.name not in VISUAL_GENOME
            if others or (sure if name in sure else maybe)[name] != place.written:
                problems.add("picture whose folder is missing, and whose name fits several: missing", f"{picture.path}")
            elif number % step == 0 and not has_size(Path(there, name), picture.width, picture.height):
                found = f"{picture.path}: {there}/{name} is not {picture.width}×{picture.height}"
                problems.add("picture whose folder is missing, and whose name fits one of another size: missing", found)
            else:
                picture.path = Path(there, name)

    def _relative(self, name: str, where: str) -> PurePosixPath:
        if "\\" in name and name not in self._with_backslashes():
            name = name.replace("\\", "/")
        relative = PurePosixPath(name)
        if relative.is_absolute() or ".." in relative.parts or not relative.name or "\0" in name:
            raise AnnotationError(f"{where}: {str(relative)!r} is not a path inside the image folder")
        return relative

    def _there(self, place: _Place, name: str) -> str:
        of_visual_genome = self._visual_genome() if place.written.name in VISUAL_GENOME else {}
        return str(self.root / of_visual_genome[name] if name in of_visual_genome else place.there)

    def _find_place(self, folder: PurePosixPath) -> _Place:
        written, parts = self.root / folder, folder.parts
        if written.is_dir():
            return _Place(written, written, True)
        above = Path(os.path.abspath(self.root)).parts
        for count in range(1, len(parts) + 1):
            there = self.root.joinpath(*parts[count:])
            if above[-count:] == parts[:count] and there.is_dir():
                return _Place(written, there, True)
        for count in range(1, len(parts)):
            there = self.root.joinpath(*parts[count:])
            if there.is_dir():
                return _Place(written, there, False)
        holds_pictures = _holds_files(self.root) or (folder.name in VISUAL_GENOME and self._visual_genome())
        return _Place(written, self.root if holds_pictures else written, False)

    def _list_visual_genome(self) -> dict[str, str]:
        """The folder of each of its files that lies in one of the two only."""
        names = {folder: {entry.name for entry in _entries(self.root / folder)} for folder in VISUAL_GENOME}
        both = set.intersection(*names.values())
        return {name: folder for folder, listed in names.items() for name in listed - both}

    def _list_with_backslashes(self) -> set[str]:
        return {entry.name for entry in _entries(self.root) if "\\" in entry.name}


def _holds_files(folder: Path) -> bool:
    return any(entry.is_file() for entry in _entries(folder))


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            yield from entries
    except OSError:  # missing: every picture will say so
        return


def files_below(folder: Path, endings: Collection[str] = PICTURES) -> list[Path]:
    """Sorted. None whose name begins with a dot, as those that macOS leaves; of a folder that lies within itself, by a
    link, no picture again."""
    found: list[Path] = []
    above = {str(folder): set[str]()}  # the real places of the folders around each
    for place, folders, names in os.walk(folder, followlinks=True):
        around, real = above.pop(place), os.path.realpath(place)
        folders[:] = [name for name in folders if not name.startswith(".")] if real not in around else []
        if real in around:
            continue
        above |= {os.path.join(place, name): {*around, real} for name in folders}
        found += [Path(place, name) for name in names if name[0] != "." and _ending(name) in endings]
    return sorted(found)


def lines_of(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a text that are not empty, stripped, with their numbers. Raises AnnotationError."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise AnnotationError(f"{path}: cannot be read: {error.strerror}") from error
    for number, line in enumerate(content.decode("utf-8-sig", "replace").splitlines(), 1):
        if line := line.strip():
            yield number, line


def label_folder_of(folder: Path) -> Path:
    """Of a folder of pictures: the one with "labels" for the last "images", where YOLO's labels lie so; or itself."""
    parts = folder.parts
    if "images" in parts:
        last = len(parts) - 1 - parts[::-1].index("images")
        if os.path.isdir(Path(*parts[:last], "labels")):
            return Path(*parts[:last], "labels", *parts[last + 1 :])
    return folder


def labels_of(pictures: Collection[Path]) -> list[Path]:
    """Where the boxes of each picture are, by YOLO's rule."""
    folders = {folder: label_folder_of(folder) for folder in {picture.parent for picture in pictures}}
    return [folders[picture.parent] / f"{picture.stem}.txt" for picture in pictures]


def labels_of_none(folders: Collection[Path], labels: Collection[Path]) -> list[Path]:
    """Label files that belong to these folders of pictures, and are not those of their pictures."""
    pairs = [(folder, label_folder_of(folder)) for folder in folders]
    return sorted({file for folder, own in pairs if own != folder for file in files_below(own, ["txt"])} - {*labels})


def _ending(name: str) -> str:
    return name.rpartition(".")[2].lower()


class NamedPictures:
    """Finds pictures by their names without endings, in several folders; each is looked into once."""

    def __init__(self, folders: Sequence[Path], problems: Problems):
        self._folders, self._problems = [Path(os.path.abspath(folder)) for folder in folders], problems
        self._listed = cache(self._list)

    def find(self, place: Path, file_name: str) -> Path:
        """The picture of that name or, where there is none or several, the one that is called `file_name`.

        Where it is in no folder, the path that it should have.
        """
        name = PurePosixPath(file_name.strip().replace("\\", "/")).name
        folders = [folder / place.parent for folder in self._folders]
        for folder in folders:
            same = self._listed(folder).get(place.name, [])
            if same:
                if len(same) > 1 and name not in same:
                    self._problems.add("several pictures of a name, the first taken", f"{folder}: {', '.join(same)}")
                return folder / (name if name in same else same[0])
        for folder in folders if _ending(name) in PICTURES else []:
            if os.path.isfile(folder / name):
                return folder / name
        there = next((folder for folder in folders if os.path.isdir(folder)), folders[0])
        return there / (name or f"{place.name}.jpg")

    def _list(self, folder: Path) -> dict[str, list[str]]:
        found: dict[str, list[str]] = defaultdict(list)
        for name in sorted(entry.name for entry in _entries(folder)):
            if _ending(name) in PICTURES:
                found[name.rpartition(".")[0]].append(name)
        return found
