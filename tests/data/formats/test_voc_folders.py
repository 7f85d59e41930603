"""Pascal VOC's folders: every box is kept or counted, which split is read, and which picture an xml describes."""

from pathlib import Path

import numpy as np
import pytest

from opendet_jax.data.datasets import read_annotations
from opendet_jax.data.formats.json_stream import AnnotationError
from opendet_jax.data.images import open_record
from opendet_jax.data.pixels import ImageError
from opendet_jax.evaluate.truth import Truth, lvis_truth, read_truth
from tests.data.formats.test_label_folders import BOX, HEIGHT, WIDTH, read, yolo
from tests.data.published import write_image


def box(*sides) -> str:
    names = ("xmin", "ymin", "xmax", "ymax")
    return f"<bndbox>{''.join(f'<{n}>{s}</{n}>' for n, s in zip(names, sides, strict=True))}</bndbox>"


def described(*sides, name="traffic_light", more="") -> str:
    return f"<object><name>{name}</name><pose>Left</pose>{more}{box(*sides)}</object>"


def xml(*objects, file_name="", size=(WIDTH, HEIGHT)) -> str:
    width, height = size
    return (
        f"<annotation><folder>VOC</folder><filename>{file_name}</filename><size><width>{width}</width>"
        f"<height>{height}</height><depth>3</depth></size>{''.join(objects)}</annotation>"
    )


def voc(
    folder: Path, files: dict[str, str], splits: dict[str, str] | None = None, pictures: str = "JPEGImages"
) -> Path:
    for number, (name, content) in enumerate(files.items()):
        (folder / "Annotations" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "Annotations" / f"{name}.xml").write_text(content)
        write_image(folder / pictures / f"{name}.jpg", WIDTH, HEIGHT, number)
    for name, lines in (splits or {}).items():
        (folder / "ImageSets" / "Main").mkdir(parents=True, exist_ok=True)
        (folder / "ImageSets" / "Main" / f"{name}.txt").write_text(lines)
    return folder


def test_pixels_of_voc_are_counted_from_one_and_the_last_is_part_of_the_box(tmp_path):
    objects = [described(1, 1, 100, 50), described(5, 7, 5, 7, name="dog"), described("10.5", 2, " 20 ", 9)]
    found, counts = read(voc(tmp_path, {"a": xml(*objects)}))
    light = "traffic light"
    assert found == {"a.jpg": [(light, [0, 0, 100, 50]), ("dog", [4, 6, 5, 7]), (light, [9.5, 1, 20, 9])]}
    assert counts == {}


@pytest.mark.parametrize(
    ("objects", "kept", "kind"),
    [
        (described(0, 0, 20, 20), 1, "box clipped to its image"),
        (described(90, 40, 120, 60), 1, "box clipped to its image"),
        (described(300, 300, 320, 320), 0, "box outside its image"),
        (described(20, 20, 10, 10), 0, "box without area"),
        (described("nan", 1, 9, 9), 0, "box is not four finite numbers"),
        (described("", 1, 9, 9), 0, "box is not four finite numbers"),
        (described(1, 1, 9, 9, name=" "), 0, "empty name"),
        (f"<object>{box(1, 1, 9, 9)}</object>", 0, "empty name"),
        ("<object><name>dog</name></object>", 0, "object without a box, left out"),
        ("<object><name>ship</name><robndbox><cx>5</cx></robndbox></object>", 0, "rotated box, left out"),
        (
            described(1, 1, 9, 9, more=f"<part><name>head</name>{box(2, 2, 3, 3)}</part>"),
            1,
            "part of an object, left out",
        ),
        (described(1, 1, 9, 9, more="<truncated>1</truncated><difficult>0</difficult>"), 1, ""),
        (described(1, 1, 9, 9, more="<difficult>1</difficult>"), 0, "difficult object, as a crowd region"),
        (
            described(1, 1, 9, 9, more="<difficult>?</difficult>"),
            1,
            "difficult is neither 0 nor 1, taken as 0, box kept",
        ),
    ],
)
def test_each_object_is_a_box_or_counted_with_its_place(tmp_path, objects, kept, kind):
    dataset, problems = read_annotations(voc(tmp_path, {"a": xml(objects, described(2, 2, 30, 30))}), "")
    assert len(dataset.records[0].boxes) == 1 + kept
    assert problems.counts == ({kind: 1} if kind else {})
    assert not kind or f"{tmp_path}/Annotations/a.xml: object[0]" in str(problems)


def test_difficult_objects_are_neither_looked_for_nor_mistakes(tmp_path):
    hard = described(11, 11, 20, 30, name="cat", more="<difficult>1</difficult>")
    dataset, _ = read_annotations(voc(tmp_path, {"a": xml(described(1, 1, 9, 9), hard)}), "")
    assert [category.name for category in dataset.categories] == ["cat", "traffic light"]
    [image] = Truth(lvis_truth(dataset)).images.values()
    assert image.objects.crowd.tolist() == [False, True]
    np.testing.assert_array_equal(image.objects.boxes, [[0, 0, 9, 9], [10, 10, 10, 20]])
    assert image.objects.category.tolist() == [1, 0]
    assert [bool(wanted) for wanted in image.objects.wanted] == [True, False]


def test_splits_of_voc(tmp_path):
    files = {name: xml(described(1, 1, 9, 9)) for name in ("2007_1", "2007_2", "2007_3", "left")}
    splits = {"train": "2007_1\n", "val": "2007_2 \n\n", "trainval": "2007_1\n2007_2\n", "dog_train": "2007_1  1\n"}
    path = voc(tmp_path, files, splits)
    assert [*read(path)[0]] == ["2007_1.jpg"]
    assert [*read(path, split="val")[0]] == ["2007_2.jpg"]
    assert [*read(path / "Annotations", split="val")[0]] == ["2007_2.jpg"]
    assert [*read(f"{path}:trainval")[0]] == ["2007_1.jpg", "2007_2.jpg"]
    with pytest.raises(AnnotationError, match=r"has no split 'test'; there are: train, trainval, val, to be named as"):
        read_annotations(f"{path}:test", "")
    with pytest.raises(AnnotationError, match=r"none of the 1 xml files can be used.*2007_1  1\.xml: .*No such file"):
        read_annotations(f"{path}:dog_train", "")


@pytest.mark.parametrize("line", ["../secret", "/etc/secret", "."])
def test_a_split_does_not_lead_outside(tmp_path, line):
    path = voc(tmp_path, {"a": xml()}, {"train": f"a\n{line}\n"})
    with pytest.raises(AnnotationError, match=r"train\.txt: .* is not a name inside the folder"):
        read_annotations(path, "")


def test_without_image_sets_all_are_read(tmp_path):
    files = {"a": xml(described(1, 1, 9, 9)), "sub/b": xml()}
    path = voc(tmp_path / "set", files)
    assert [*read(path, split="val")[0]] == ["a.jpg", "b.jpg"]
    with pytest.raises(AnnotationError, match="has no split 'val', nor any other"):
        read_annotations(f"{path}:val", "")
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "a.xml").write_text(files["a"])
    write_image(tmp_path / "flat" / "a.png", WIDTH, HEIGHT, 1)
    assert [*read(tmp_path / "flat")[0]] == ["a.png"]


def test_which_picture_an_xml_describes(tmp_path):
    """That of its own name; of several, or of none, the one that it names."""
    names = ["own", "two", "many", "other", "gone"]
    files = {name: xml(described(1, 1, 9, 9), file_name=f"C:\\photos\\{name}.PNG") for name in names}
    path = voc(tmp_path, files)
    for name in ("two.PNG", "many.gif", "renamed.bmp"):
        write_image(tmp_path / "JPEGImages" / name, WIDTH, HEIGHT, 1)
    (tmp_path / "JPEGImages" / "other.jpg").unlink()
    (tmp_path / "JPEGImages" / "gone.jpg").unlink()
    (path / "Annotations" / "other.xml").write_text(xml(described(1, 1, 9, 9), file_name="renamed.bmp"))
    dataset, problems = read_annotations(path, "")
    found = [record.path.name for record in dataset.records]
    assert found == ["gone.PNG", "many.gif", "renamed.bmp", "own.jpg", "two.PNG"]
    assert problems.counts == {"several pictures of a name, the first taken": 1}
    moved = tmp_path / "photos"
    (tmp_path / "JPEGImages").rename(moved)
    assert {record.path.parent for record in read_annotations(path, moved)[0].records} == {moved}


def test_a_size_that_is_not_the_pictures_is_an_error_when_it_is_read(tmp_path):
    path = voc(
        tmp_path, {"a": xml(size=(200, 50)), "b": xml(size=(0, 0)), "c": xml(size=("", "")), "d": xml(size=(0, 9))}
    )
    dataset, problems = read_annotations(path, "")
    with pytest.raises(ImageError, match=r"a\.jpg: is 100×50, its annotations say 200×50"):
        open_record(dataset.records[0])
    assert [(record.width, record.height) for record in dataset.records[1:]] == [(WIDTH, HEIGHT)] * 2
    assert problems.counts == {
        "xml without a size, the picture's taken": 2,
        "xml that cannot be used, its picture left out": 1,
    }


def test_pictures_have_one_root_however_the_folder_is_named(tmp_path, monkeypatch):
    """`prepare` looks for the folder above all of them, which relative and absolute paths do not have."""
    yolo(tmp_path / "yolo", {"train/a.jpg": BOX})
    voc(tmp_path / "voc", {"a": xml(), "b": xml()})
    (tmp_path / "photos").mkdir()
    (tmp_path / "voc" / "JPEGImages" / "a.jpg").rename(tmp_path / "photos" / "a.jpg")
    monkeypatch.chdir(tmp_path)
    found = [read_annotations("yolo", "")[0], read_annotations("voc", tmp_path / "photos")[0]]
    paths = ["yolo/images/train/a.jpg", "photos/a.jpg", "voc/JPEGImages/b.jpg"]
    assert [record.path for dataset in found for record in dataset.records] == [tmp_path / path for path in paths]


ENTITY = '<!DOCTYPE a [<!ENTITY e "dog">]>'


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (ENTITY + xml(described(1, 1, 9, 9, name="&e;")), "has a DOCTYPE, 'a'"),
        ('<!DOCTYPE a SYSTEM "file:///etc/passwd">' + xml(), "has a DOCTYPE, 'a'"),
        (xml(described(1, 1, 9, 9, name="&e;")), "undefined entity"),
        ("<annotation>", "no element found"),
        ("", "no element found"),
        ("<html/>", "is <html>, not <annotation>"),
        ('<?xml version="1.0" encoding="none"?><annotation/>', "unknown encoding"),
    ],
)
def test_xml_files_that_cannot_be_used_are_left_out_and_counted(tmp_path, content, said):
    path = voc(tmp_path, {"a": content, "b": xml(described(1, 1, 9, 9))}, {"val": "a\nb\n", "train": "a\n"})
    dataset, problems = read_annotations(path, "", split="val")
    assert len(dataset) == 1
    assert problems.counts == {"xml that cannot be used, its picture left out": 1}
    assert f"{tmp_path}/Annotations/a.xml: " in str(problems)
    assert said in str(problems)
    with pytest.raises(AnnotationError, match="none of the 1 xml files can be used"):
        read_annotations(path, "")
    with pytest.raises(AnnotationError, match="xml that cannot be used, its picture left out"):
        read_truth(path, None, minival=False)
