"""Reading results files, good and bad."""

import json

import numpy as np
import pytest

from opendet_jax.data.json_stream import AnnotationError
from opendet_jax.evaluate.results_file import ResultsError, read_results

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
