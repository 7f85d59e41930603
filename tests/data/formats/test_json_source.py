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
            r"categories\[0\] \(id 3\): field 'synonyms' is 'bus', not a list of strings",
        ),
        (
            "categories",
            {**CATEGORY, "synonyms": ["bus", 5]},
            r"categories\[0\] \(id 3\): field 'synonyms' is \['bus', 5\], not a list of strings",
        ),
        ("categories", {**CATEGORY, "id": -1}, r"categories\[0\] \(id -1\): field 'id' is −1, which stands for names"),
        ("categories", {**CATEGORY, "name": None}, r"categories\[0\] \(id 3\): field 'name' is None, not a string"),
        (
            "images",
            {**IMAGE, "file_name": None, "coco_url": None},
            r"images\[0\] \(id 7\) has no field 'file_name' and no 'coco_url'",
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
        ({"caption": []}, "empty name"),
        ({"names": ["", None]}, "empty name"),
        ({"names": {}}, "name is not text"),
        ({"names": 5.5}, "name is not text"),
        ({"names": float("nan")}, "name is not text"),
        ({"names": False}, "name is not text"),
        ({"names": ["bus", ["coach"]]}, "name is not text"),
        ({"image_id": None}, "unknown image id"),
        ({"image_id": 7.0}, "unknown image id"),
        ({"category_id": None}, "unknown category id"),
        ({"bbox": None}, "box is not four finite numbers"),
        ({"iscrowd": 1}, "crowd region"),
        ({"iscrowd": "1"}, "crowd region"),
        ({"iscrowd": True}, "crowd region"),
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


OPTIONAL = {
    "images": (IMAGE, ("coco_url", "license", "neg_category_ids", "not_exhaustive_category_ids")),
    "annotations": (ANNOTATION, ("id", "iscrowd", "ignore", "area", "names", "caption_with_token", "caption")),
    "categories": (CATEGORY, ("synonyms", "frequency", "supercategory")),
}


@pytest.mark.parametrize(("part", "field"), [(part, field) for part in OPTIONAL for field in OPTIONAL[part][1]])
def test_an_optional_field_that_is_null_is_absent(tmp_path, part, field):
    entry = without(OPTIONAL[part][0], field)
    (absent, _), (null, problems) = (
        read_json(write(tmp_path, **{part: [changed]}), tmp_path) for changed in (entry, {**entry, field: None})
    )
    assert problems.counts == {}
    assert null.categories == absent.categories
    [ours], [theirs] = null.records, absent.records
    assert (ours.path, ours.names, ours.boxes.tolist()) == (theirs.path, theirs.names, theirs.boxes.tolist())


def test_a_file_name_that_is_null_is_that_of_the_url(tmp_path):
    image = {**IMAGE, "file_name": None, "coco_url": "http://x/val2017/b.jpg"}
    assert read_json(write(tmp_path, [image]), tmp_path)[0].records[0].path == tmp_path / "b.jpg"


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"names": None, "object_name": "coach"}, ("coach",)),
        ({"names": 0}, ("0",)),
        ({"names": ["bus", None, " ", 7]}, ("bus", "7")),
    ],
)
def test_names_that_are_null_or_numbers(tmp_path, fields, names):
    dataset, problems = read_json(write(tmp_path, annotations=[{**ANNOTATION, **fields}]), tmp_path)
    assert dataset.records[0].names == (names,)
    assert problems.counts == {}


def test_a_field_of_names_that_is_null_everywhere_is_missing(tmp_path):
    path = write(tmp_path, annotations=[{**ANNOTATION, "label": None}])
    with pytest.raises(AnnotationError, match="no annotation has the field 'label'"):
        read_json(path, tmp_path, name_field="label")


@pytest.mark.parametrize("value", ["0", "0.0", "false", "", 0.0, False, None])
def test_what_is_no_crowd(tmp_path, value):
    dataset, problems = read_json(write(tmp_path, annotations=[{**ANNOTATION, "iscrowd": value}]), tmp_path)
    assert len(dataset.records[0].boxes) == 1
    assert problems.counts == {}


@pytest.mark.parametrize("value", ["maybe", 2, -1, float("nan"), [1], {}])
def test_what_is_neither_a_crowd_nor_none_is_kept_and_counted(tmp_path, value):
    dataset, problems = read_json(write(tmp_path, annotations=[{**ANNOTATION, "iscrowd": value}]), tmp_path)
    assert len(dataset.records[0].boxes) == 1
    assert problems.counts == {"iscrowd is neither 0 nor 1, taken as 0, box kept": 1}


@pytest.mark.parametrize("value", ["rare", 3, float("nan"), ["r"], {}, True])
def test_a_group_of_frequency_that_is_none_is_counted(tmp_path, value):
    dataset, problems = read_json(write(tmp_path, categories=[{**CATEGORY, "frequency": value}]), tmp_path)
    assert dataset.categories[0].frequency == ""
    assert problems.counts == {"frequency is not r, c, f or u, category kept without": 1}


def test_empty_synonyms_are_left_out(tmp_path):
    synonyms = [None, "", " _ ", "auto_bus"]
    dataset, _ = read_json(write(tmp_path, categories=[{**CATEGORY, "synonyms": synonyms}]), tmp_path)
    assert dataset.categories[0].synonyms == ("auto bus",)


def test_one_file_of_several_images_is_counted(tmp_path):
    """However it is written; equal names in different folders are different files."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    files = {1: "a/1.jpg", 2: "b/1.jpg", 3: "./a//1.jpg", 4: "b/2.jpg", 5: "a/1.jpg"}
    images = [{**IMAGE, "id": number, "file_name": name} for number, name in files.items()]
    annotations = [{**ANNOTATION, "id": number, "image_id": number} for number in files]
    dataset, problems = read_json(write(tmp_path, images, annotations), tmp_path)
    assert [len(record.boxes) for record in dataset.records] == [1] * 5
    assert problems.counts == {"file of another image id too, image kept": 2}
    assert f"{tmp_path}/a/1.jpg: images 1, 3, " in str(problems)


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
