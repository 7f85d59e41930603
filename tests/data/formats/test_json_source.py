"""Reading LVIS and COCO json: names, boxes, and every kind of bad input."""

import json

import numpy as np
import pytest

from opendet_jax.data.formats.json_source import AnnotationError, read_json

IMAGE = {"id": 7, "file_name": "a.jpg", "width": 100, "height": 50}
CATEGORY = {"id": 3, "name": "bus_(vehicle)", "synonyms": ["bus_(vehicle)", "autobus"], "frequency": "c"}
ANNOTATION = {"id": 1, "image_id": 7, "category_id": 3, "bbox": [10, 20, 30, 15]}


def write(tmp_path, images=(IMAGE,), annotations=(ANNOTATION,), categories=(CATEGORY,)):
    path = tmp_path / "set.json"
    content = {"images": list(images), "annotations": list(annotations), "categories": list(categories)}
    path.write_text(json.dumps(content))
    return path


def test_reads_names_boxes_and_categories(tmp_path):
    dataset, problems = read_json(write(tmp_path), tmp_path / "images")
    [record], [category] = dataset.records, dataset.categories
    assert (record.image_id, record.width, record.height) == (7, 100, 50)
    assert record.path == tmp_path / "images/a.jpg"
    np.testing.assert_array_equal(record.boxes, [[10, 20, 40, 35]])
    assert record.names == (("bus (vehicle)",),)
    assert record.category_ids.tolist() == [3]
    assert (category.name, category.synonyms, category.frequency) == (
        "bus (vehicle)",
        ("bus (vehicle)", "autobus"),
        "c",
    )
    assert dataset.names() == ("bus (vehicle)",)
    assert problems.counts == {}


def test_captions_give_the_names_of_their_box(tmp_path):
    path = write(tmp_path, annotations=[{**ANNOTATION, "caption": "city bus, red_bus ,"}])
    assert read_json(path, tmp_path)[0].records[0].names == (("city bus", "red_bus"),)


def test_images_without_objects_are_kept(tmp_path):
    dataset, _ = read_json(write(tmp_path, annotations=[]), tmp_path)
    assert dataset.records[0].boxes.shape == (0, 4)
    assert len(dataset.first(0)) == len(dataset.first(5)) == 1


@pytest.mark.parametrize("folders", [(), ("val2017",)])
def test_coco_url_gives_the_file_name(tmp_path, folders):
    for folder in folders:
        (tmp_path / folder).mkdir()
    image = {"id": 7, "coco_url": "http://images.cocodataset.org/val2017/000000000139.jpg", "width": 100, "height": 50}
    [record] = read_json(write(tmp_path, [image]), tmp_path)[0].records
    assert record.path == tmp_path.joinpath(*folders, "000000000139.jpg")


def without(entry, field):
    return {key: value for key, value in entry.items() if key != field}


@pytest.mark.parametrize(
    ("part", "entry", "message"),
    [
        ("images", without(IMAGE, "id"), r"images\[0\] has no field 'id'"),
        ("images", without(IMAGE, "width"), r"images\[0\] \(id 7\) has no field 'width'"),
        ("images", without(IMAGE, "file_name"), r"images\[0\] \(id 7\) has no field 'file_name' and no 'coco_url'"),
        ("images", {**IMAGE, "height": 0}, r"images\[0\] \(id 7\): field 'height' is not positive"),
        ("images", {**IMAGE, "height": "tall"}, r"images\[0\] \(id 7\): field 'height' is 'tall', not an integer"),
        ("images", {**IMAGE, "file_name": 5}, r"images\[0\] \(id 7\): field 'file_name' is 5, not a string"),
        (
            "images",
            {**IMAGE, "file_name": "../secret.jpg"},
            r"images\[0\] \(id 7\): '../secret.jpg' is not a path inside",
        ),
        ("images", {**IMAGE, "file_name": "/etc/passwd"}, r"images\[0\] \(id 7\): '/etc/passwd' is not a path inside"),
        ("images", {**IMAGE, "file_name": ""}, r"images\[0\] \(id 7\): .* is not a path inside"),
        (
            "images",
            {**IMAGE, "width": 2**25},
            r"images\[0\] \(id 7\): field 'width' is 33554432, more than 16777216 pixels",
        ),
        (
            "images",
            {**IMAGE, "id": 2**70},
            r"images\[0\] \(id 1180591620717411303424\): field 'id' is 118.*, not an integer",
        ),
        (
            "categories",
            {**CATEGORY, "synonyms": "bus"},
            r"categories\[0\] \(id 3\): field 'synonyms' is 'bus', not a list",
        ),
        ("images", "a.jpg", r"images\[0\] has no field 'id'"),
        ("categories", without(CATEGORY, "name"), r"categories\[0\] \(id 3\) has no field 'name'"),
        ("annotations", without(ANNOTATION, "bbox"), r"annotations\[0\] \(id 1\) has no field 'bbox'"),
        ("annotations", without(ANNOTATION, "image_id"), r"annotations\[0\] \(id 1\) has no field 'image_id'"),
    ],
)
def test_missing_and_wrong_fields_are_named(tmp_path, part, entry, message):
    path = write(tmp_path, **{part: [entry]})
    with pytest.raises(AnnotationError, match=message) as caught:
        read_json(path, tmp_path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(("part", "entry"), [("images", IMAGE), ("categories", CATEGORY)])
def test_ids_occur_once(tmp_path, part, entry):
    changed = {**entry, "width": 60, "name": "car"}
    path = write(tmp_path, **{part: [entry, changed]})
    with pytest.raises(AnnotationError, match=rf"{part}\[1\] \(id \d\): the id occurs twice, with different contents"):
        read_json(path, tmp_path)


def test_entries_written_twice_are_counted(tmp_path):
    path = write(tmp_path, [IMAGE] * 2, [ANNOTATION] * 3, [CATEGORY] * 2)
    dataset, problems = read_json(path, tmp_path)
    assert [len(record.boxes) for record in dataset.records] == [3]
    assert len(dataset.categories) == 1
    assert problems.counts == {"repeated image": 1, "repeated category": 1, "repeated annotation id, box kept": 2}
    assert "images[1] (id 7)" in str(problems)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not json"),
        ("[]", "has no list 'images'"),
        ('{"images": [], "annotations": {}, "categories": []}', "has no list 'annotations'"),
    ],
)
def test_files_of_another_kind(tmp_path, text, message):
    path = tmp_path / "set.json"
    path.write_text(text)
    with pytest.raises(AnnotationError, match=message):
        read_json(path, tmp_path)


def test_missing_file(tmp_path):
    with pytest.raises(AnnotationError, match=r"none\.json: cannot be read: No such file"):
        read_json(tmp_path / "none.json", tmp_path)


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"bbox": [float("nan"), 0, 5, 5]}, "box is not four finite numbers"),
        ({"bbox": [0, 0, float("inf"), 5]}, "box is not four finite numbers"),
        ({"bbox": [0, 0, 5]}, "box is not four finite numbers"),
        ({"bbox": [0, 0, None, 5]}, "box is not four finite numbers"),
        ({"bbox": [0, 0, 1e308, 1e308]}, "box is not four finite numbers"),
        ({"bbox": [10**400, 0, 5, 5]}, "box is not four finite numbers"),
        ({"bbox": [True, 0, 5, 5]}, "box is not four finite numbers"),
        ({"bbox": "0 0 5 5"}, "box is not four finite numbers"),
        ({"bbox": [0, 0, 0, 5]}, "box without area"),
        ({"bbox": [50, 0, 1e-9, 5]}, "box without area"),
        ({"bbox": [0, 0, 5, -5]}, "box without area"),
        ({"bbox": [100, 0, 5, 5]}, "box outside its image"),
        ({"bbox": [-9, -9, 5, 5]}, "box outside its image"),
        ({"category_id": 99}, "unknown category id"),
        ({"category_id": [3]}, "unknown category id"),
        ({"image_id": 99}, "unknown image id"),
        ({"image_id": {"id": 7}}, "unknown image id"),
        ({"category_id": 4}, "empty name"),
        ({"caption": " , "}, "empty name"),
        ({"iscrowd": 1}, "crowd region"),
    ],
)
def test_unusable_annotations_are_passed_over_and_counted(tmp_path, change, kind):
    bad = {**ANNOTATION, "id": 55, **change}
    path = write(tmp_path, annotations=[bad, ANNOTATION], categories=[CATEGORY, {"id": 4, "name": " "}])
    dataset, problems = read_json(path, tmp_path)
    assert len(dataset.records[0].boxes) == 1
    assert problems.counts == {kind: 1}
    assert "annotations[0] (id 55)" in str(problems)
    assert kind in str(problems)


def test_boxes_are_clipped_to_the_image_and_counted(tmp_path):
    dataset, problems = read_json(write(tmp_path, annotations=[{**ANNOTATION, "bbox": [-5, 40, 300, 20]}]), tmp_path)
    np.testing.assert_array_equal(dataset.records[0].boxes, [[0, 40, 100, 50]])
    assert problems.counts == {"box clipped to its image": 1}


def test_problems_show_three_examples(tmp_path):
    path = write(tmp_path, annotations=[{**ANNOTATION, "id": i, "image_id": 99} for i in range(5)])
    _, problems = read_json(path, tmp_path)
    assert problems.counts == {"unknown image id": 5}
    assert len(problems.examples["unknown image id"]) == 3


@pytest.mark.parametrize(("name", "images", "boxes"), [("train", 256, 2125), ("val", 180, 1329)])
def test_minilvis(data_folder, name, images, boxes):
    dataset, problems = read_json(data_folder / f"minilvis/{name}.json", data_folder / "minilvis/images")
    assert len(dataset) == images
    assert sum(len(record.boxes) for record in dataset.records) == boxes
    assert set(problems.counts) <= {"box clipped to its image"}
    assert len(dataset.categories) == 80
    assert all(record.path.is_file() for record in dataset.records)
    assert not any("_" in category.name for category in dataset.categories)
