"""Reading results files, good and bad."""

import json

import numpy as np
import pytest

from opendet_jax.data.formats.json_stream import AnnotationError
from opendet_jax.evaluate.name_mapping import UNMAPPED, Classes, ExactMapping
from opendet_jax.evaluate.results import ImageResults, ResultsError, read_results, results_file
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


GOOD = {"image_id": 7, "category_id": 3, "bbox": [1, 2.5, 3, 0], "score": 0.5}


def read(path, content):
    path = path / "p.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return read_results(path, {7, 9}, {3, 4})


def test_detections_by_image(tmp_path):
    records = [
        {**GOOD, "image_id": 9, "id": 5, "segmentation": []},
        GOOD,
        {**GOOD, "image_id": 9, "category_id": -1, "bbox": [-4.0, 0, 1, 1], "score": 0},
    ]
    results = read(tmp_path, records)
    assert len(results) == 3
    assert results.images == 2
    seven, nine = results.by_image()
    assert (seven.image_id, nine.image_id) == (7, 9)
    np.testing.assert_array_equal(seven.detections.boxes, [[1, 2.5, 3, 0]])
    np.testing.assert_array_equal(nine.numbers, [0, 2])
    np.testing.assert_array_equal(nine.detections.category_ids, [3, -1])
    np.testing.assert_array_equal(nine.detections.scores, [0.5, 0])
    assert seven.detections.names is None
    assert [image.image_id for image in results.by_image({9})] == [9]


def test_names_where_every_record_has_them(tmp_path):
    named = {**GOOD, "names": ["cat", "dog"]}
    assert read(tmp_path, [named, named]).detections.names == ["cat", "cat"]
    assert read(tmp_path, [named, GOOD]).detections.names is None
    assert read(tmp_path, [named, {**GOOD, "names": None, "id": None}]).detections.names is None


def test_no_detections(tmp_path):
    results = read(tmp_path, [])
    assert len(results) == results.images == len(list(results.by_image())) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 8}, "image_id 8 is not in the annotations"),
        ({"image_id": "7"}, "image_id '7' is not in the annotations"),
        ({"image_id": [7]}, r"image_id \[7\] is not in the annotations"),
        ({"image_id": True}, "image_id True is not in the annotations"),
        ({"category_id": 5}, "category_id 5 is not in the annotations"),
        ({"category_id": None}, "category_id None is not in the annotations"),
        ({"bbox": [0, 0, -1, 5]}, r"bbox \[0, 0, -1, 5\] is not x, y, width, height"),
        ({"bbox": [0, 0, 1, float("nan")]}, r"bbox \[0, 0, 1, nan\]"),
        ({"bbox": [0, float("inf"), 1, 1]}, r"bbox \[0, inf, 1, 1\]"),
        ({"bbox": [0, 10**400, 1, 1]}, r"bbox \[0, 10000"),
        ({"bbox": [0, 0, 1]}, r"bbox \[0, 0, 1\]"),
        ({"bbox": "0 0 1 1"}, "bbox '0 0 1 1'"),
        ({"bbox": [0, 0, 1, "1"]}, r"bbox \[0, 0, 1, '1'\]"),
        ({"score": -0.1}, "score -0.1 is not a number from 0 on"),
        ({"score": float("nan")}, "score nan"),
        ({"score": float("inf")}, "score inf"),
        ({"score": "0.5"}, "score '0.5'"),
        ({"score": None}, "score None"),
        ({"id": 5}, "id 5 occurs twice"),
        ({"names": "cat"}, "names 'cat' is not a list of strings"),
        ({"names": []}, r"names \[\] is not a list of strings"),
    ],
)
def test_a_bad_record_is_named(tmp_path, change, message):
    with pytest.raises(ResultsError, match=rf"p\.json: record 2: {message}"):
        read(tmp_path, [{**GOOD, "id": 5}, GOOD, {**GOOD, **change}])


@pytest.mark.parametrize("missing", GOOD)
def test_a_missing_field_is_named(tmp_path, missing):
    record = {key: value for key, value in GOOD.items() if key != missing}
    with pytest.raises(ResultsError, match=rf"p\.json: record 1: has no field '{missing}'"):
        read(tmp_path, [GOOD, record])


@pytest.mark.parametrize("content", [{}, {"annotations": [GOOD]}, "5", '"text"'])
def test_what_is_no_list_is_refused(tmp_path, content):
    with pytest.raises(ResultsError, match=r"p\.json: is not a list of detections"):
        read(tmp_path, content)


def test_what_is_no_detection_is_refused(tmp_path):
    with pytest.raises(ResultsError, match=r"p\.json: record 1: is \[1\], not a detection"):
        read(tmp_path, [GOOD, [1]])


@pytest.mark.parametrize("length", [10, 60, -1])
def test_a_file_cut_off_is_refused(tmp_path, length):
    whole = json.dumps([GOOD, GOOD])
    with pytest.raises(AnnotationError, match=r"p\.json: is not json: \[\d\], at character [\d,]+: the file ends"):
        read(tmp_path, whole[:length])


def test_other_files_are_refused(tmp_path):
    for content in ("", "hello", '[{"image_id" 7}]'):
        with pytest.raises(AnnotationError, match=r"p\.json: is not json"):
            read(tmp_path, content)
    with pytest.raises(AnnotationError, match=r"gone\.json: cannot be read"):
        read_results(tmp_path / "gone.json", {7}, {3})
    (tmp_path / "b.json").write_bytes(b"[\xff\xfe]")
    with pytest.raises(AnnotationError, match=r"b\.json: is not json"):
        read_results(tmp_path / "b.json", {7}, {3})
