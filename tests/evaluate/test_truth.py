"""Annotations as the truth of an evaluation."""

import json

import pytest

from opendet_jax.data.formats.json_source import read_json
from opendet_jax.data.formats.json_stream import AnnotationError
from opendet_jax.evaluate.truth import lvis_truth, read_truth

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
    truth = lvis_truth(dataset.first(1))
    assert truth["images"] == [{"id": 1, "neg_category_ids": [2, 4], "not_exhaustive_category_ids": []}]
    assert [(a["area"], a["ignore"], a["iscrowd"]) for a in truth["annotations"]] == [
        (11.5, 0, 0),
        (11.5, 1, 1),
        (11.5, 0, 0),
        (30, 0, 0),
        (11.5, 1, 0),
    ]
    assert truth["categories"][0] == {"id": 2, "name": "hot dog", "synonyms": [], "frequency": ""}
    assert len(lvis_truth(dataset)["annotations"]) == 6


@pytest.mark.parametrize(
    ("annotation", "message"),
    [
        ({"bbox": [0, 0, -1, 6]}, r"annotation 9 of image 1: bbox \[0, 0, -1, 6\] is not x, y, width, height"),
        ({"bbox": [0, 0, 5, float("nan")]}, r"annotation 9 of image 1: bbox \[0, 0, 5, nan\]"),
        ({"bbox": [0, 0, 5]}, r"annotation 9 of image 1: bbox \[0, 0, 5\]"),
        ({"area": float("inf")}, "annotation 9 of image 1: area is inf"),
        ({"id": 1}, "annotation 1 of image 1: the id occurs twice"),
        ({"category_id": 77}, r"unknown category id: annotations\[1\] \(id 9\): 77"),
        ({"image_id": 77}, r"unknown image id: annotations\[1\] \(id 9\): 77"),
    ],
)
def test_a_truth_to_score_a_file_against_is_wholly_usable(tmp_path, annotation, message):
    path = write(tmp_path, BOX, {**BOX, "id": 9, **annotation})
    with pytest.raises(AnnotationError, match=rf"truth\.json: {message}"):
        read_truth(path, tmp_path, minival=False)


def test_lists_of_classes_are_lists_of_ids(tmp_path):
    path = write(tmp_path, BOX, neg_category_ids=["cat"])
    with pytest.raises(AnnotationError, match=r"truth\.json: image 1: neg_category_ids is \['cat'\]"):
        read_truth(path, tmp_path, minival=False)


def test_no_image(tmp_path):
    (tmp_path / "truth.json").write_text(json.dumps({**content(), "images": []}))
    with pytest.raises(AnnotationError, match=r"truth\.json: there is no image"):
        read_truth(tmp_path / "truth.json", tmp_path, minival=False)
