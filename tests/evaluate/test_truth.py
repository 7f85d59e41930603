"""Annotations as the truth of an evaluation."""

import json

import pytest

from opendet_jax.data.formats.json_source import read_json
from opendet_jax.data.formats.json_stream import AnnotationError
from opendet_jax.data.formats.records import Problems
from opendet_jax.evaluate.truth import Truth, lvis_truth, read_truth

BOX = {"image_id": 1, "category_id": 2, "bbox": [0, 0, 5, 6], "area": 11.5, "id": 1}


def content(*annotations, **image_fields):
    return {
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": 20, "height": 10, **image_fields} for i in (1, 2)],
        "annotations": list(annotations),
        "categories": [{"id": 2, "name": "hot_dog"}, {"id": 4, "name": "cat"}],
    }


def write(folder, *annotations, **image_fields):
    path = folder / "truth.json"
    path.write_text(json.dumps(content(*annotations, **image_fields)))
    return path


def test_truth_of_a_coco_json(tmp_path):
    """No frequencies, no lists of absent classes; crowds are ignored, boxes without area are objects."""
    path = write(
        tmp_path,
        BOX,
        {**BOX, "id": 2, "iscrowd": 1},
        {**BOX, "id": 3, "bbox": [0, 0, 0, 6]},
        {key: value for key, value in BOX.items() if key != "area"},
        {**BOX, "id": 5, "image_id": 2},
        {**BOX, "id": 6, "category_id": 77},
        {**BOX, "id": 7, "bbox": [0, 0, -1, 6]},
        {**BOX, "id": 8, "bbox": [0, 0, float("nan"), 6]},
        {**BOX, "id": 9, "area": -1},
        {**BOX, "id": 10, "ignore": 1},
    )
    dataset, _ = read_json(path, tmp_path)
    problems = Problems()
    truth = lvis_truth(dataset.first(1), problems=problems)
    assert truth["images"] == [{"id": 1, "neg_category_ids": [2, 4], "not_exhaustive_category_ids": []}]
    assert [(a["area"], a["ignore"], a["iscrowd"]) for a in truth["annotations"]] == [
        (11.5, 0, 0),
        (11.5, 1, 1),
        (11.5, 0, 0),
        (30, 0, 0),
        (30, 0, 0),
        (11.5, 1, 0),
    ]
    assert problems.counts == {
        "unknown category id, passed over": 1,
        "box that is none, passed over": 2,
        "area that is none, the box's taken": 1,
    }
    assert "(annotation 6 of image 1: unknown category id 77)" in str(problems)
    assert truth["categories"][0] == {"id": 2, "name": "hot dog", "synonyms": [], "frequency": ""}
    assert len(lvis_truth(dataset)["annotations"]) == 7


@pytest.mark.parametrize(
    ("annotation", "message"),
    [
        ({"bbox": [0, 0, -1, 6]}, r"annotation 9 of image 1: bbox \[0, 0, -1, 6\] is not x, y, width, height"),
        ({"bbox": [0, 0, 5, float("nan")]}, r"annotation 9 of image 1: bbox \[0, 0, 5, nan\]"),
        ({"bbox": [0, 0, 5]}, r"annotation 9 of image 1: bbox \[0, 0, 5\]"),
        ({"id": 1}, "annotation 1 of image 1: the id occurs twice"),
        ({"category_id": 77}, r"unknown category id: annotations\[1\] \(id 9\): 77"),
        ({"image_id": 77}, r"unknown image id: annotations\[1\] \(id 9\): 77"),
    ],
)
def test_a_truth_to_score_a_file_against_is_wholly_usable(tmp_path, annotation, message):
    path = write(tmp_path, BOX, {**BOX, "id": 9, **annotation})
    with pytest.raises(AnnotationError, match=rf"truth\.json: {message}"):
        read_truth(path, tmp_path, minival=False)


NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("area", [None, "900", "", "wide", -1, NAN, INFINITY, True, [], {}, 10**400, 1e11, -INFINITY])
def test_an_area_that_is_none_is_that_of_the_box(tmp_path, area, strict):
    dataset, _ = read_json(write(tmp_path, {**BOX, "area": area}), tmp_path)
    problems = Problems()
    [annotation] = lvis_truth(dataset, strict, problems)["annotations"]
    assert annotation["area"] == 30
    assert problems.counts == ({} if area is None else {"area that is none, the box's taken": 1})


def test_an_object_that_is_larger_than_any_range_is_ignored_and_counted(tmp_path):
    """As pycocotools has it: its ranges end at 1e10 square pixels."""
    boxes = [[0, 0, 1e5, 1e5], [0, 0, 2e5, 1e5], [0, 0, 1e200, 1e200]]
    dataset, _ = read_json(write(tmp_path, *({**BOX, "id": i, "bbox": b} for i, b in enumerate(boxes))), tmp_path)
    problems = Problems()
    assert Truth(lvis_truth(dataset, problems=problems)).wanted[:, 0].sum() == 3  # by their areas of 11.5
    assert problems.counts == {}
    for annotation in (content := json.loads((tmp_path / "truth.json").read_text()))["annotations"]:
        del annotation["area"]
    (tmp_path / "truth.json").write_text(json.dumps(content))
    assert Truth(lvis_truth(dataset, problems=problems)).wanted[:, 0].sum() == 1
    assert problems.counts == {"larger than 1e10 square pixels, ignored": 2}


@pytest.mark.parametrize("field", ["iscrowd", "ignore"])
@pytest.mark.parametrize(
    ("value", "written"),
    [
        *((value, 0) for value in (None, 0, 0.0, False, "0", "0.0", " false ", "")),
        *((value, 1) for value in (1, 1.0, True, "1", "True")),
        *((value, None) for value in ("word", 2, -1, NAN, INFINITY, [], [1], {}, 10**30)),
    ],
)
def test_flags(tmp_path, field, value, written):
    """What is neither 0 nor 1 is 0, and counted."""
    dataset, read = read_json(write(tmp_path, {**BOX, field: value}), tmp_path)
    problems = Problems()
    [annotation] = lvis_truth(dataset, problems=problems)["annotations"]
    assert annotation["ignore"] == bool(written)
    assert annotation["iscrowd"] == (bool(written) if field == "iscrowd" else 0)
    counted = {} if written is not None else {f"{field} is neither 0 nor 1, taken as 0, box kept": 1}
    assert problems.counts == counted
    if field == "iscrowd":
        assert read.counts == ({"crowd region": 1} if written else counted)
        assert len(dataset.records[0].boxes) == (not written)


@pytest.mark.parametrize("field", ["neg_category_ids", "not_exhaustive_category_ids"])
def test_lists_of_classes_that_are_null_or_name_unknown_ones(tmp_path, field):
    problems = Problems()
    dataset, _ = read_json(write(tmp_path, BOX, **{field: None}), tmp_path)
    assert lvis_truth(dataset, problems=problems)["images"][0] == {
        "id": 1,
        "neg_category_ids": [2, 4],
        "not_exhaustive_category_ids": [],
    }
    assert problems.counts == {}
    dataset, _ = read_json(write(tmp_path, BOX, **{field: [4, 77, 2**70]}), tmp_path)
    content = lvis_truth(dataset.first(1), problems=problems)
    assert content["images"][0][field] == [4]
    assert problems.counts == {f"unknown category id in {field}, left out": 2}
    assert len(Truth(content).images) == 1


def test_objects_of_a_class_without_a_name(tmp_path):
    """Nothing can be called it: passed over as in training, but not where a file says its classes itself."""
    path = write(tmp_path, BOX, {**BOX, "id": 2, "category_id": 4})
    whole = json.loads(path.read_text())
    whole["categories"][1]["name"] = " _"
    path.write_text(json.dumps(whole))
    dataset, read = read_json(path, tmp_path)
    problems = Problems()
    assert len(lvis_truth(dataset, problems=problems)["annotations"]) == 1
    assert problems.counts == {"class without a name, passed over": 1}
    assert read.counts == {"empty name": 1}
    assert len(read_truth(path, tmp_path, minival=False)[1]["annotations"]) == 2


def test_image_ids_are_whole_numbers(tmp_path):
    """True and 1.0 equal 1, and are unknown ids in training: so here."""
    dataset, read = read_json(write(tmp_path, BOX, {**BOX, "image_id": True}, {**BOX, "image_id": 1.0}), tmp_path)
    assert read.counts["unknown image id"] == 2
    assert len(lvis_truth(dataset)["annotations"]) == len(dataset.records[0].boxes) == 1


def test_lists_of_classes_are_lists_of_ids(tmp_path):
    path = write(tmp_path, BOX, neg_category_ids=["cat"])
    with pytest.raises(AnnotationError, match=r"truth\.json: image 1: neg_category_ids is \['cat'\]"):
        read_truth(path, tmp_path, minival=False)


def test_no_image(tmp_path):
    (tmp_path / "truth.json").write_text(json.dumps({**content(), "images": []}))
    with pytest.raises(AnnotationError, match=r"truth\.json: there is no image"):
        read_truth(tmp_path / "truth.json", tmp_path, minival=False)
