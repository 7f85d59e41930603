import json

import numpy as np
import pytest

from opendet_jax.evaluate.name_mapping import UNMAPPED, Classes, ExactMapping
from opendet_jax.evaluate.results import ImageResults, results_file
from opendet_jax.files import replacing, write_json
from opendet_jax.inference import Found

FOUND = Found(
    boxes=np.array([[1, 2, 11, 22.5], [0, 0, 1 / 3, 1]], np.float32),
    scores=np.array([0.75, 0.5], np.float32),
    names=[["Cat ", "dog"], ["a thing", ""]],
    name_scores=np.array([[-0.25, -1], [-0.5, -2]], np.float32),
)


def test_one_class_a_box():
    mapping = ExactMapping([{"id": 3, "name": "cat"}])
    image = ImageResults(8, FOUND, mapping(FOUND.names, FOUND.scores))
    first, second = image.entries(300)
    assert first == {
        "image_id": 8,
        "category_id": 3,
        "bbox": [1.0, 2.0, 10.0, 20.5],
        "score": 0.75,
        "names": ["Cat ", "dog"],
        "name_scores": [-0.25, -1.0],
    }
    assert second["category_id"] == UNMAPPED
    assert second["bbox"] == [0.0, 0.0, 0.333, 1.0]
    json.dumps([first, second])
    for found in (image.boxes(), image.detections()):
        np.testing.assert_array_equal(found.category_ids, [3, UNMAPPED])
        np.testing.assert_array_equal(found.boxes, [first["bbox"], second["bbox"]])
        np.testing.assert_array_equal(found.scores, [0.75, 0.5])
        assert list(found.names) == ["Cat ", "a thing"]


def test_several_classes_a_box():
    """The best detections may be several of one box; of equal scores the better box's goes first."""
    ids = np.array([[3, 1, 2], [2, 3, 1]], np.int64)
    scores = np.array([[0.9, 0.4, 0.0], [0.5, 0.4, 0.0]], np.float32)
    image = ImageResults(8, FOUND, Classes(ids, scores))
    found = image.detections()
    np.testing.assert_array_equal(found.category_ids, [3, 2, 1, 3, 2, 1])
    np.testing.assert_array_equal(found.boxes[:, 2], [10, 0.333, 10, 0.333, 10, 0.333])
    np.testing.assert_allclose(found.scores, [0.9, 0.5, 0.4, 0.4, 0, 0])
    assert list(found.names) == ["Cat ", "a thing"] * 3
    best = image.entries(3)
    assert [(entry["category_id"], entry["bbox"][2], entry["names"][0]) for entry in best] == [
        (3, 10, "Cat "),
        (2, 0.333, "a thing"),
        (1, 10, "Cat "),
    ]
    boxes = image.boxes()
    np.testing.assert_array_equal(boxes.category_ids, [3, 2])
    np.testing.assert_array_equal(boxes.scores, [0.75, 0.5])  # p, whatever the class


def test_nothing_found_and_no_class():
    nothing = Found(FOUND.boxes[:0], FOUND.scores[:0], [], FOUND.name_scores[:0])
    image = ImageResults(8, nothing, Classes(np.zeros((0, 15), np.int64), np.zeros((0, 15), np.float32)))
    assert len(image.boxes()) == len(image.detections()) == len(image.entries(300)) == 0
    image = ImageResults(8, FOUND, Classes(np.zeros((2, 0), np.int64), np.zeros((2, 0), np.float32)))
    assert len(image.detections()) == 0
    np.testing.assert_array_equal(image.boxes().category_ids, [UNMAPPED] * 2)


def test_the_file_of_results_grows_image_by_image(tmp_path):
    path = tmp_path / "eval" / "predictions.json"
    with results_file(path) as write:
        write([{"names": ["é\n"]}, {"score": 0.5}])
        write([])
        write([{"score": 1.0}])
        assert not path.exists()
    assert json.loads(path.read_text()) == [{"names": ["é\n"]}, {"score": 0.5}, {"score": 1.0}]
    assert len(path.read_text().splitlines()) == 5
    with results_file(path):
        pass
    assert json.loads(path.read_text()) == []


def write_and_fail(path):
    with results_file(path) as write:
        write([{"score": float("nan")}])


def test_a_file_of_results_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_and_fail(tmp_path / "predictions.json")
    assert list(tmp_path.iterdir()) == []


def test_files_are_whole_or_absent(tmp_path):
    target = tmp_path / "new/file.json"
    write_json(target, {"a": None})
    assert json.loads(target.read_text()) == {"a": None}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(target, {"a": float("nan")})
    with pytest.raises(FileNotFoundError), replacing(target):  # nothing written
        pass
    assert json.loads(target.read_text()) == {"a": None}
    assert list(target.parent.iterdir()) == [target]
