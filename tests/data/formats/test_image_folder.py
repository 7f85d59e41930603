"""Where pictures are found: never one picture for the boxes of another."""

import json

import pytest
from PIL import Image

from opendet_jax.data.formats import image_folder
from opendet_jax.data.formats.image_folder import ImageFolder, files_below
from opendet_jax.data.formats.json_source import read_json
from opendet_jax.data.formats.json_stream import AnnotationError
from opendet_jax.data.formats.records import Problems
from opendet_jax.data.formats.visual_genome import read_visual_genome
from tests.data.published import CATEGORIES, coco_json

SEVERAL = "picture whose folder is missing, and whose name fits several: missing"
OTHER_SIZE = "picture whose folder is missing, and whose name fits one of another size: missing"


class Entry:
    def __init__(self, path, size):
        self.path, (self.width, self.height) = path, size


@pytest.fixture
def root(tmp_path):
    return tmp_path / "data"


def unpack(root, *files, size=(20, 10)):
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size).save(root / name, "PNG")


def found(root, names, urls=None, size=(20, 10)):
    """Paths relative to the root of the entries of a json, None for what is missing; the problems."""
    folder, problems = ImageFolder(root), Problems()
    urls = urls or [""] * len(names)
    entries = [Entry(folder.find(name, url, "here"), size) for name, url in zip(names, urls, strict=True)]
    folder.settle(entries, problems)
    paths = [entry.path.relative_to(root).as_posix() if entry.path.is_file() else None for entry in entries]
    return paths, problems


@pytest.mark.parametrize(
    ("on_disk", "names", "paths", "several"),
    [
        # As the json says.
        (["a/1.png", "b/1.png"], ["a/1.png", "b/1.png"], ["a/1.png", "b/1.png"], 0),
        # Unpacked without the top folders.
        (["1.png", "2.png"], ["a/1.png", "b/2.png"], ["1.png", "2.png"], 0),
        (["p/1.png", "q/1.png"], ["x/p/1.png", "x/q/1.png"], ["p/1.png", "q/1.png"], 0),
        # Two pictures, one file: which of them it is cannot be told.
        (["1.png"], ["a/1.png", "b/1.png"], [None, None], 2),
        (["1.png", "2.png"], ["a/1.png", "b/1.png", "b/2.png"], [None, None, "2.png"], 2),
        (["p/1.png"], ["x/p/1.png", "y/p/1.png"], [None, None], 2),
        (["p/1.png", "x/p/1.png"], ["x/p/1.png", "y/p/1.png"], ["x/p/1.png", "p/1.png"], 0),
        (["1.png"], ["a/1.png", "b/1.png", "c/1.png", "a/1.png"], [None] * 4, 4),
        # A file that has its own entry is no other picture.
        (["1.png", "2.png"], ["1.png", "a/1.png", "a/2.png"], ["1.png", None, "2.png"], 1),
        (["1.png", "2.png"], ["a/1.png", "a/2.png", "1.png"], [None, "2.png", "1.png"], 1),
        # The same picture twice is one.
        (["1.png"], ["a/1.png", "a/1.png"], ["1.png", "1.png"], 0),
        # The root is the json's folder "data" itself.
        (["1.png"], ["data/1.png", "other/1.png"], ["1.png", None], 1),
        (["1.png"], ["other/1.png", "data/1.png"], [None, "1.png"], 1),
        (["b/1.png"], ["data/b/1.png", "c/b/1.png"], ["b/1.png", None], 1),
        # and in it no other folder's pictures can lie.
        (["1.png", "2.png"], ["data/1.png", "other/2.png"], ["1.png", None], 1),
        (["1.png"], ["other/1.png", "data/1.png", "1.png"], [None, None, "1.png"], 2),
        # Written on Windows.
        (["a/b/1.png"], ["a\\b\\1.png", "a/b/1.png"], ["a/b/1.png"] * 2, 0),
        (["1.png"], ["C:\\photos\\1.png"], ["1.png"], 0),
        (["1.png"], ["a\\1.png", "b\\1.png"], [None, None], 2),
        (["a\\1.png", "a/1.png", "a/2.png"], ["a\\1.png", "a\\2.png"], ["a\\1.png", "a/2.png"], 0),
    ],
)
def test_pictures_of_a_json(root, on_disk, names, paths, several):
    unpack(root, *on_disk)
    result, problems = found(root, names)
    assert result == paths
    assert problems.counts == ({SEVERAL: several} if several else {})
    missing = tuple(name.replace("\\", "/") for name, path in zip(names, paths, strict=True) if path is None)
    assert all(example.endswith(missing) for example in problems.examples.get(SEVERAL, ()))


@pytest.mark.parametrize(
    ("on_disk", "urls", "paths"),
    [
        (["train/1.png", "val/1.png"], ["http://x/train/1.png", "http://x/val/1.png"], ["train/1.png", "val/1.png"]),
        (["1.png", "2.png"], ["http://x/train/1.png", "http://x/val/2.png"], ["1.png", "2.png"]),
        (["1.png"], ["http://x/train/1.png", "http://x/val/1.png"], [None, None]),
        (["1.png"], ["http://x/data/1.png", "http://x/val/1.png"], ["1.png", None]),
        (["VG_100K/1.png"], ["http://x/VG_100K_2/1.png"], ["VG_100K/1.png"]),
        (["VG_100K/1.png", "2.png"], ["http://x/other/1.png", "http://x/other/2.png"], [None, "2.png"]),
        (["VG_100K/1.png"], ["http://x/VG_100K_2/1.png", "http://x/VG_100K/1.png"], [None, "VG_100K/1.png"]),
    ],
)
def test_pictures_known_by_their_urls(root, on_disk, urls, paths):
    unpack(root, *on_disk)
    assert found(root, [""] * len(urls), urls)[0] == paths


@pytest.mark.parametrize("given", ["", ".", "../data"])
def test_roots_that_are_relative(root, given, monkeypatch):
    unpack(root, "1.png", "2.png", "3.png")
    monkeypatch.chdir(root)
    names, problems = ["1.png", "a/1.png", "a/2.png", "data/3.png", "a/3.png"], Problems()
    folder = ImageFolder(given)
    entries = [Entry(folder.find(name, "", "here"), (20, 10)) for name in names]
    folder.settle(entries, problems)
    assert [entry.path.is_file() for entry in entries] == [True, False, False, True, False]
    assert problems.counts == {SEVERAL: 3}


def test_bare_names_in_both_folders_of_visual_genome(root):
    unpack(root, "VG_100K/1.png", "VG_100K_2/1.png", "VG_100K_2/2.png")
    assert found(root, ["1.png", "2.png"])[0] == [None, "VG_100K_2/2.png"]


@pytest.mark.parametrize(("size", "fits"), [((20, 10), True), ((20, 11), False), ((10, 20), False)])
def test_a_file_found_without_its_folder_has_the_size_of_the_json(root, size, fits):
    unpack(root, "1.png", size=size)
    paths, problems = found(root, ["a/1.png"])
    assert paths == ["1.png" if fits else None]
    assert problems.counts == ({} if fits else {OTHER_SIZE: 1})
    assert fits or "a/1.png: " in problems.examples[OTHER_SIZE][0]


def test_a_file_that_exif_turns_has_the_size_of_the_json(root):
    exif = Image.Exif()
    exif[0x0112] = 6
    root.mkdir()
    Image.new("RGB", (10, 20)).save(root / "1.jpg", exif=exif)
    assert found(root, ["a/1.jpg"])[0] == ["1.jpg"]


def test_files_that_lie_where_the_json_says_are_not_opened(root, monkeypatch):
    monkeypatch.setattr(image_folder, "has_size", lambda *_: pytest.fail("opened"))
    unpack(root, "a/1.png", "2.png")
    assert found(root, ["a/1.png", "2.png"], size=(1, 1))[0] == ["a/1.png", "2.png"]


def test_of_many_files_a_sample_is_opened(root, monkeypatch):
    opened = []
    monkeypatch.setattr(image_folder, "has_size", lambda path, *_: not opened.append(path))
    monkeypatch.setattr(image_folder, "MEASURED", 4)
    unpack(root, *(f"{i}.png" for i in range(10)))
    assert found(root, [f"a/{i}.png" for i in range(10)])[0] == [f"{i}.png" for i in range(10)]
    assert [path.name for path in opened] == ["0.png", "3.png", "6.png", "9.png"]


def test_windows_shares_and_steps_outside_are_refused(root):
    for name in ("\\\\server\\a.png", "..\\a.png", "a\\..\\..\\b.png"):
        with pytest.raises(AnnotationError, match=r"^here: .* is not a path inside the image folder"):
            ImageFolder(root).find(name, "", "here")


def test_visual_genomes_images_are_settled(root):
    """The url of one names a folder that is missing, and the file in the root is that of no one else."""
    unpack(root, "1.png", "2.png")
    images = [
        {"image_id": i, "width": 20, "height": 10, "url": f"http://x/{folder}/{name}.png"}
        for i, (folder, name) in enumerate([("VG_100K", 1), ("VG_100K_2", 1), ("VG_100K_2", 2)])
    ]
    (root / "image_data.json").write_text(json.dumps(images))
    (root / "objects.json").write_text(json.dumps([{"image_id": i, "objects": []} for i in range(3)]))
    dataset, problems = read_visual_genome(root / "objects.json", root)
    assert [record.path.is_file() for record in dataset.records] == [False, False, True]
    assert problems.counts == {SEVERAL: 2}


def test_a_json_with_one_of_two_cameras_unpacked(root):
    unpack(root, "cam1/1.png")
    images = [{"id": i, "file_name": f"cam{i}/1.png", "width": 20, "height": 10} for i in (1, 2)]
    coco_json(root / "a.json", images, [], CATEGORIES)
    dataset, problems = read_json(root / "a.json", root / "cam1")
    assert [record.path.relative_to(root).as_posix() for record in dataset.records] == ["cam1/1.png", "cam1/cam2/1.png"]
    assert problems.counts == {SEVERAL: 1}
    assert "cam2/1.png" in str(problems)


def test_a_folder_that_is_there_twice(root):
    """By a link beside it: what is named by the folder's own path has its labels there."""
    (root / "v2").mkdir(parents=True)
    (root / "v2/a.jpg").touch()
    (root / "current").symlink_to(root / "v2", target_is_directory=True)
    assert files_below(root) == [root / "current/a.jpg", root / "v2/a.jpg"]


def test_a_folder_within_itself(root):
    """By a link, two of which would be followed for ever."""
    (root / "below").mkdir(parents=True)
    for place in ("a.jpg", "below/b.jpg"):
        (root / place).touch()
    for name in ("one", "other"):
        (root / "below" / name).symlink_to(root, target_is_directory=True)
    assert files_below(root) == [root / "a.jpg", root / "below/b.jpg"]
