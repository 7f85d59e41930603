"""Where the pictures of a json lie below a folder, however their archives were unpacked."""

import os
from functools import cache
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from opendet_jax.data.formats.json_stream import AnnotationError

VISUAL_GENOME = ("VG_100K", "VG_100K_2")  # its two archives


def url_folder(url: str) -> str:
    """The last folder of a url: "val2017" of "http://images.cocodataset.org/val2017/000000000139.jpg"."""
    return PurePosixPath(urlsplit(url).path).parent.name


class ImageFolder:
    """Finds pictures by looking at folders, each once, and never at single files.

    A picture named "a/b/c.jpg" lies in a/b, in b or in the folder itself: the first of these that exists. One named
    "c.jpg" alone lies in the last folder of its url, where that exists, in one of Visual Genome's two, where they
    exist, or in the folder itself.
    """

    def __init__(self, root: str | Path):
        self.root = Path(root)
        self._parent = cache(self._find_parent)
        self._is_folder = cache(lambda name: (self.root / name).is_dir())
        self._visual_genome = cache(self._list_visual_genome)

    def find(self, name: str, url: str, where: str) -> Path:
        """The path of a picture by its file name, or by its url alone where `name` is empty.

        Raises AnnotationError, which begins with `where`, where that is not below the folder.
        """
        relative = PurePosixPath(name or PurePosixPath(urlsplit(url).path).name)
        if relative.is_absolute() or ".." in relative.parts or not relative.name or "\0" in name:
            raise AnnotationError(f"{where}: {str(relative)!r} is not a path inside the image folder")
        if len(relative.parts) > 1:
            return self._parent(relative.parent) / relative.name
        folder = url_folder(url)
        if folder not in ("", "..") and self._is_folder(folder):
            return self.root / folder / relative.name
        return self.root / self._visual_genome().get(relative.name, "") / relative.name

    def _find_parent(self, parent: PurePosixPath) -> Path:
        shorter = [self.root.joinpath(*parent.parts[skipped:]) for skipped in range(len(parent.parts))]
        found = next((folder for folder in shorter if folder.is_dir()), None)
        if found is not None:
            return found
        return self.root if _holds_files(self.root) else self.root / parent

    def _list_visual_genome(self) -> dict[str, str]:
        folders = [name for name in VISUAL_GENOME if self._is_folder(name)]
        return {entry.name: name for name in folders for entry in os.scandir(self.root / name)}


def _holds_files(folder: Path) -> bool:
    try:
        with os.scandir(folder) as entries:
            return any(entry.is_file() for entry in entries)
    except OSError:  # missing: every picture will say so
        return False
