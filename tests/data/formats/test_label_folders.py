"""YOLO's folders: every box is kept or counted, which split is read, and where pictures lie."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from opendet_jax.data.datasets import read_annotations
from opendet_jax.data.formats.json_stream import AnnotationError
from opendet_jax.data.formats.label_folders import UNREADABLE
from opendet_jax.data.images import open_record
from opendet_jax.data.pixels import ImageError
from opendet_jax.evaluate.truth import Truth, read_truth
from tests.data.published import write_image

WIDTH, HEIGHT = 100, 50
BOX = "0 0.5 0.5 0.2 0.4\n"
IN_PIXELS = [40, 15, 60, 35]
YAML = "train: images/train\nval: images/val\nnames:\n  0: traffic_light\n  1: dog\n"
NO_LABEL = "picture without a label file, taken as one without objects"


def yolo(folder: Path, labels: dict[str, str | None], fields: str = YAML) -> Path:
    """Pictures of 100×50 in images/, and beside it in labels/ their texts, where there are such; a data.yaml."""
    for number, (name, text) in enumerate(labels.items()):
        write_image(folder / "images" / name, WIDTH, HEIGHT, number)
        if text is not None:
            label = (folder / "labels" / name).with_suffix(".txt")
            label.parent.mkdir(parents=True, exist_ok=True)
            label.write_text(text)
    (folder / "data.yaml").write_text(fields)
    return folder / "data.yaml"


def read(path, images="", **options):
    """Boxes with their names by the pictures' names, and what was counted."""
    dataset, problems = read_annotations(path, images, **options)
    found = {
        record.path.name: [
            (*names, box) for names, box in zip(record.names, np.round(record.boxes, 3).tolist(), strict=True)
        ]
        for record in dataset.records
    }
    return found, problems.counts


def test_every_picture_of_a_yolo_split_is_there(tmp_path):
    labels = {"a.jpg": BOX, "b.JPG": BOX, "c.PNG": "1 0.5 0.5 1 1\n\n", "empty.jpg": "", "none.jpg": None}
    labels = {f"train/{name}": text for name, text in labels.items()} | {"train/sub/d.jpeg": BOX, "val/e.jpg": BOX}
    found, counts = read(yolo(tmp_path, labels))
    light = [("traffic light", IN_PIXELS)]
    assert found == {
        "a.jpg": light,
        "b.JPG": light,
        "c.PNG": [("dog", [0, 0, 100, 50])],
        "d.jpeg": light,
        "empty.jpg": [],
        "none.jpg": [],
    }
    assert counts == {NO_LABEL: 1}


@pytest.mark.parametrize(
    ("line", "kept", "kind"),
    [
        ("0 0.95 0.5 0.2 0.4", [85, 15, 100, 35], "box clipped to its image"),
        ("0 0.5 0.5 1.00001 0.4", [0, 15, 100, 35], ""),
        ("0 0.833333 0.5 0.333335 0.4", [66.667, 15, 100, 35], ""),
        ("0.0 5e-1 0.5 0.2 0.4", IN_PIXELS, ""),
        ("\ufeff0 0.5 0.5 0.2 0.4", IN_PIXELS, ""),
        ("0 2 2 0.1 0.1", None, "box outside its image"),
        ("0 50 25 20 10", None, "box outside its image"),
        ("0 0.5 0.5 0 0.4", None, "box without area"),
        ("0 0.5 0.5 -0.2 0.4", None, "box without area"),
        ("0 0.5 0.5 1e-9 0.4", None, "box without area"),
        ("0 nan 0.5 0.2 0.4", None, "box is not four finite numbers"),
        ("0 0.1 0.1 nan 0.1 0.5 0.5", None, "box is not four finite numbers"),
        ("2 0.5 0.5 0.2 0.4", None, "unknown category id"),
        ("-1 0.5 0.5 0.2 0.4", None, "unknown category id"),
        ("0.5 0.5 0.5 0.2 0.4", None, "unknown category id"),
        ("nan 0.5 0.5 0.2 0.4", None, "unknown category id"),
        ("dog 0.5 0.5 0.2 0.4", None, "line that is not of numbers"),
        ("0,0.5,0.5,0.2,0.4", None, "line that is not of numbers"),
        ("0 0.5 0.5 0.2", None, "line that is no box"),
        ("0", None, "line that is no box"),
        ("0 0.5 0.5 0.2 0.4 0.9", None, "line of six numbers: a rotated box, or one with a score"),
        ("0 0.1 0.1 0.5 0.1 0.5 0.5 0.9", None, "line that is no box"),
        ("0 0.1 0.2 0.5 0.2 0.5 0.6", [10, 10, 50, 30], "polygon: its extent taken"),
        (
            "0 0.1 0.2 0.5 0.1 0.6 0.6 0.2 0.5",
            [10, 5, 60, 30],
            "four corners, of a polygon or a rotated box: its extent taken",
        ),
    ],
)
def test_each_line_is_a_box_or_counted_with_its_place(tmp_path, line, kept, kind):
    path = yolo(tmp_path, {"train/a.jpg": f"{line}\n{BOX}"})
    dataset, problems = read_annotations(path, "")
    wanted = [IN_PIXELS] if kept is None else [kept, IN_PIXELS]
    np.testing.assert_allclose(dataset.records[0].boxes, wanted, atol=1e-3)
    assert problems.counts == ({kind: 1} if kind else {})
    assert not kind or f"{tmp_path}/labels/train/a.txt:1: " in str(problems)
    lost = len(problems.counts) if kept is None else 0
    assert len(dataset.records[0].boxes) + lost == 2


def test_boxes_of_poses_are_kept_without_their_points(tmp_path):
    path = yolo(tmp_path, {"train/a.jpg": f"{BOX.strip()} 0.1 0.2 0.3 0.4\n"}, YAML + "kpt_shape: [2, 2]\n")
    assert read(path) == ({"a.jpg": [("traffic light", IN_PIXELS)]}, {})


def test_labels_of_no_picture_are_counted(tmp_path):
    path = yolo(tmp_path, {"train/a.jpg": BOX})
    (tmp_path / "labels/train/gone.txt").write_text(BOX * 3)
    (tmp_path / "labels/train/classes.txt").write_text("traffic_light\ndog\n")
    assert read(path)[1] == {"box in a label file without a picture": 3}


def test_pictures_of_one_stem_share_their_labels_and_it_is_said(tmp_path):
    found, counts = read(yolo(tmp_path, {"train/a.jpg": BOX, "train/a.png": BOX}))
    assert [len(boxes) for boxes in found.values()] == [1, 1]
    assert counts == {"label file of several pictures, its boxes taken for each": 1}


def test_which_split_is_read(tmp_path):
    path = yolo(tmp_path, {"train/a.jpg": BOX, "val/b.jpg": BOX, "test/c.jpg": BOX}, YAML + "test: [images/test]\n")
    assert [*read(path)[0]] == ["a.jpg"]
    assert [*read(path, split="val")[0]] == ["b.jpg"]
    assert [*read(f"{path}:test", split="val")[0]] == ["c.jpg"]
    assert [*read(f"{tmp_path}:val")[0]] == ["b.jpg"]
    dataset, _ = read_annotations(path, "", split="val")
    assert str(dataset.annotations) == f"{path}:val"


@pytest.mark.parametrize(
    ("fields", "split", "message"),
    [
        (YAML, "test", "has no split 'test'; there are: train, val, to be named as .*data.yaml:train"),
        ("names: [a]\ntest:\n", "train", "has no split 'train', nor any other"),
        ("names: [a]\nval: ~\ntrain: images/train", "val", "has no split 'val'; there are: train"),
    ],
)
def test_a_split_that_is_not_there(tmp_path, fields, split, message):
    with pytest.raises(AnnotationError, match=message):
        read_annotations(yolo(tmp_path, {"train/a.jpg": BOX}, fields), "", split=split)


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ("[bus_(vehicle), dog]", ("bus (vehicle)", "dog")),
        ("{0: no, 1: 1.10}", ("no", "1.10")),
        ("{1: dog, 0: null}", ("null", "dog")),
        ("{'1': dog, 0: a b }", ("a b", "dog")),
        ("{0: cat, 1: dog, 7: cow}", ("cat", "dog")),
    ],
)
def test_names_are_those_of_their_numbers_as_they_are_written(tmp_path, fields, names):
    path = yolo(tmp_path, {"train/a.jpg": BOX + BOX.replace("0", "1", 1)}, f"train: images\nnames: {fields}\n")
    dataset, _ = read_annotations(path, "")
    assert tuple(name for [name] in dataset.records[0].names) == names
    assert dataset.records[0].category_ids.tolist() == [0, 1]
    assert [c.id for c in dataset.categories] == ([0, 1, 7] if "cow" in fields else [0, 1])


def test_an_empty_name_is_counted(tmp_path):
    path = yolo(tmp_path, {"train/a.jpg": BOX}, "train: images\nnames: ['', _]\n")
    assert read(path) == ({"a.jpg": []}, {"empty name": 1})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("- a\n", "is not a data.yaml"),
        ("", "is not a data.yaml"),
        ("train: [", "is not yaml: while parsing"),
        ("train: a\ntrain: b\nnames: [a]", "is not yaml: 'train' occurs twice"),
        ("train: images\nnames: {0: a, 0: b}", "is not yaml: '0' occurs twice"),
        ("train: images\nnames: {0: a, 00: b}", "field 'names' has '00': 'b', not a class's number and name"),
        ("train: images\nnames: {a: 0}", "field 'names' has 'a': '0', not"),
        (f"train: images\nnames: {{{'9' * 20}: a}}", "field 'names' has '999"),
        (f"train: images\nnames: [a]\nkpt_shape: [2, {'9' * 5000}]", "field 'kpt_shape' is"),
        ("train: images\nnames: [[a]]", r"field 'names' has 0: \['a'\], not"),
        ("train: images\nnames: a.names", "field 'names' is 'a.names', not names"),
        ("train: images\n", "field 'names' is None, not names"),
        ("train: images\nnc: 3\nnames: [a, b]", "field 'nc' is 3, but there are 2 names"),
        ("train: images\nnames: [a]\nkpt_shape: 17", "field 'kpt_shape' is 17, not two whole numbers"),
        ("train: {a: b}\nnames: [a]", "field 'train' is {'a': 'b'}, not a text or a list"),
        ("train: nowhere\nnames: [a]", "train: 'nowhere' is no folder, and no .txt that lists pictures: /.*nowhere"),
        ("train: labels\nnames: [a]", "train: there is no picture in labels"),
        ("train: images/train/a.jpg\nnames: [a]", "train: 'images/train/a.jpg' is no folder, and no .txt"),
        ("train: &a [*a]\nnames: [a]", "is not yaml: found unconstructable recursive node"),
        (f"train: {'[' * 5000}\nnames: [a]", "is not yaml"),
    ],
)
def test_a_data_yaml_that_cannot_be_used(tmp_path, fields, message):
    path = yolo(tmp_path, {"train/a.jpg": BOX}, fields)
    with pytest.raises(AnnotationError, match=message) as error:
        read_annotations(path, "")
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def test_python_in_a_data_yaml_is_not_run(tmp_path):
    fields = f"train: images\nnames: !!python/object/apply:os.mkdir ['{tmp_path}/made', dog]\n"
    dataset, _ = read_annotations(yolo(tmp_path, {"train/a.jpg": BOX}, fields), "")
    assert [category.name for category in dataset.categories][1:] == ["dog"]
    assert not (tmp_path / "made").exists()


def test_where_a_split_lies(tmp_path):
    """Below `path`, where that is not there beside data.yaml, and below the folder that `images` names."""
    names = "names: [a]\n"
    fields = f"path: {tmp_path}/elsewhere\ntrain: images/train\n{names}"
    path = yolo(tmp_path / "set", {"train/a.jpg": BOX}, fields)
    assert [*read(path)[0]] == ["a.jpg"]
    yolo(tmp_path / "elsewhere", {"train/b.jpg": BOX}, "")
    assert [*read(path)[0]] == ["b.jpg"]
    yolo(tmp_path / "third", {"train/c.jpg": BOX}, "")
    assert [*read(path, tmp_path / "third")[0]] == ["c.jpg"]
    roboflow = yolo(tmp_path / "set", {"train/a.jpg": BOX}, f"train: ../images/train\n{names}")
    assert [*read(roboflow)[0]] == ["a.jpg"]
    with pytest.raises(AnnotationError, match=r"data\.yaml: images = .*none is no folder"):
        read_annotations(path, tmp_path / "none")


def test_labels_lie_beside_pictures_where_there_is_no_folder_of_labels(tmp_path):
    write_image(tmp_path / "images" / "set" / "a.jpg", WIDTH, HEIGHT, 1)
    (tmp_path / "images" / "set" / "a.txt").write_text(BOX)
    (tmp_path / "images" / "data.yaml").write_text("train: set\nnames: [cat]")
    assert read(tmp_path / "images") == ({"a.jpg": [("cat", IN_PIXELS)]}, {})


def test_a_split_without_any_label_is_an_error(tmp_path):
    path = yolo(tmp_path, {"train/a.jpg": None})
    with pytest.raises(AnnotationError, match=r"train: no picture has a label file; looked for: .*images/train/a\.txt"):
        read_annotations(path, "")


def test_lists_of_pictures(tmp_path):
    """Relative to the list or the data set, absolute, with backslashes; labels of other splits are no strangers."""
    path = yolo(tmp_path, {f"all/{name}.jpg": BOX for name in "abcdefg"}, "train: [lists/t.txt]\nnames: [cat]\n")
    (tmp_path / "lists").mkdir()
    lines = ["../images/all/a.jpg", "./images/all/b.jpg", "", f"{tmp_path}/images/all/c.jpg", r"images\all\d.jpg"]
    (tmp_path / "lists" / "t.txt").write_text("\n".join([*lines, "images/all/a.jpg", "images/all/none.jpg"]))
    dataset, problems = read_annotations(path, "")
    assert [record.path.name for record in dataset.records] == ["a.jpg", "b.jpg", "c.jpg", "d.jpg", "none.jpg"]
    assert problems.counts == {"picture that is named twice, taken once": 1, UNREADABLE: 1, NO_LABEL: 1}


def test_sizes_are_those_of_the_upright_picture(tmp_path):
    """As the program that trains YOLO has it: labels are of the picture as EXIF turns it."""
    path = yolo(tmp_path, {f"train/a.{ending}": BOX for ending in ("jpg", "png", "tif", "webp")})
    for picture in (tmp_path / "images" / "train").iterdir():
        exif = Image.Exif()
        exif[0x112] = 6
        Image.new("RGB", (WIDTH, HEIGHT)).save(picture, exif=exif)
    dataset, _ = read_annotations(path, "")
    assert len(dataset) == 4
    for record in dataset.records:
        assert open_record(record).size == (record.width, record.height) == (HEIGHT, WIDTH)
        np.testing.assert_allclose(record.boxes, [[20, 30, 30, 70]], atol=1e-4)


def test_a_picture_that_cannot_be_read_is_treated_as_one_that_is_missing(tmp_path):
    path = yolo(tmp_path, {"train/a.jpg": BOX, "train/b.jpg": BOX, "val/a.jpg": BOX})
    (tmp_path / "images" / "train" / "a.jpg").write_bytes(b"no picture")
    dataset, problems = read_annotations(path, "")
    assert problems.counts == {UNREADABLE: 1}
    assert "a.jpg: its size cannot be read" in str(problems)
    with pytest.raises(ImageError, match=r"a\.jpg: is not an image"):
        open_record(dataset.records[0])
    write_image(tmp_path / "images" / "train" / "a.jpg", WIDTH, HEIGHT, 1)
    with pytest.raises(ImageError, match=r"a\.jpg: is 100×50, its annotations say 1×1"):
        open_record(dataset.records[0])
    (tmp_path / "images" / "val" / "a.jpg").write_bytes(b"no picture")
    with pytest.raises(AnnotationError, match="to be taken for missing"):
        read_truth(path, None, minival=False)


def test_ids_of_images_are_those_of_their_places(tmp_path):
    """In every copy of a folder, however its root is named, and whatever is added."""

    def ids(path, images=""):
        return {record.path.name: record.image_id for record in read_annotations(path, images)[0].records}

    first = ids(yolo(tmp_path / "one", {"train/b.jpg": BOX, "train/c.jpg": BOX}))
    path = yolo(tmp_path / "two", {f"train/{name}.jpg": BOX for name in "abcd"})
    assert ids(path).items() > first.items()
    assert ids(path, tmp_path / "two") == ids(path)
    os.symlink(tmp_path / "two", tmp_path / "three")
    assert ids(tmp_path / "three") == ids(path)
    assert len(set(ids(path).values())) == 4
    assert max(ids(path).values()) < 2**52
    val = yolo(tmp_path / "four", {"val/b.jpg": BOX})
    assert read_annotations(val, "", split="val")[0].records[0].image_id != first["b.jpg"]


def test_the_truth_of_a_yolo_folder_is_as_that_of_a_json_in_cocos_form(tmp_path):
    path = yolo(tmp_path, {"val/a.jpg": "0 0.95 0.5 0.2 0.4\n1 0.5 0.5 0.2 0.4 0.1\n", "val/b.jpg": ""})
    dataset, content, problems = read_truth(path, None, minival=False)
    truth = Truth(content)
    assert truth.is_coco
    assert [category["name"] for category in truth.categories] == ["traffic light", "dog"]
    np.testing.assert_allclose(truth.images[dataset.records[0].image_id].objects.boxes, [[85, 15, 15, 20]], atol=1e-4)
    assert len(problems.counts) == 2
    (tmp_path / "labels" / "val" / "b.txt").write_text("7 0.5 0.5 0.2 0.4\n")
    with pytest.raises(AnnotationError, match=r"unknown category id: .*/b\.txt:1: 7 0\.5"):
        read_truth(path, None, minival=False)


def test_what_has_no_splits_and_what_is_neither_form(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.yaml").write_text(YAML)
    with pytest.raises(AnnotationError, match=r"a\.json: has no splits, and so no 'val'"):
        read_annotations(f"{tmp_path}/a.json:val", "")
    with pytest.raises(AnnotationError, match=r"empty: is a folder, and not one that .* nor Pascal VOC's"):
        read_annotations(tmp_path / "empty", "")
    with pytest.raises(AnnotationError, match=r"a\.yaml: is in YOLO's form, which has no field 'label'"):
        read_annotations(tmp_path / "a.yaml", "", "label")
    with pytest.raises(AnnotationError, match=r"none\.json:val: cannot be read: No such file"):
        read_annotations(f"{tmp_path}/none.json:val", "")
