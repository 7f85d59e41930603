"""Detections by themselves, and what is relied on in the libraries that they are handed to."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest
import supervision
from lvis import LVIS, LVISEval, LVISResults
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from trackers import ByteTrackTracker

from opendet_jax.drawing import colour_of
from opendet_jax.errors import InputError
from opendet_jax.evaluate.results import read_results
from opendet_jax.predict.detections import SHOWN, Detections

NAMES = ["red star", "cup <&>", "red star", "", "日本"]
NOTHING = Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), [], [], np.zeros((0, 3), np.float32))


def some(names, shift=0.0):
    """Boxes of 10 × 20 side by side; row i has the score 0.9 − i/10, and name scores that no other row has."""
    count = np.arange(len(names), dtype=np.float32)
    x0 = 30 * count + np.float32(shift)
    return Detections(
        boxes=np.stack([x0, 5 + 0 * count, x0 + 10, 25 + 0 * count], 1),
        scores=0.9 - count / 10,
        names=list(names),
        alternatives=[[f"{name} {place}", f"other {place}"] for place, name in enumerate(names)],
        name_scores=np.stack([-count - 1, -count - 2, -count - 3], 1),
    )


FOUND = some(NAMES)


def rows(found):
    return list(zip(*found.to_dict().values(), strict=True))


@pytest.mark.parametrize(
    ("chosen", "places"),
    [
        (3, [3]),
        (-1, [4]),
        (np.int64(2), [2]),
        (slice(1, 4), [1, 2, 3]),
        (slice(None, None, -1), [4, 3, 2, 1, 0]),
        (slice(7, 9), []),
        ([4, 0, 0], [4, 0, 0]),
        ([], []),
        (np.array([2, -1]), [2, 4]),
        (FOUND.scores > 0.65, [0, 1, 2]),
        ([True, False, False, True, False], [0, 3]),
        (np.zeros(5, bool), []),
    ],
)
def test_parts(chosen, places):
    part = FOUND[chosen]
    assert isinstance(part, Detections)
    assert rows(part) == [rows(FOUND)[place] for place in places]
    assert part.boxes.shape == (len(places), 4)
    assert part.name_scores.shape == (len(places), 3)
    part.boxes[:] = 7
    assert FOUND.boxes.max() > 100


@pytest.mark.parametrize("chosen", [5, -6, [0, 5], np.ones(4, bool), [[0]], np.array([0.5])])
def test_parts_that_are_not_there(chosen):
    with pytest.raises(IndexError):
        FOUND[chosen]


def test_one_by_one():
    assert [one.names for one in FOUND] == [[name] for name in NAMES]
    assert [len(one) for one in FOUND] == [1] * 5
    assert list(NOTHING) == []
    assert FOUND in [NOTHING, FOUND]
    assert some(NAMES) != FOUND


class Cells(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.texts = [], []

    def handle_starttag(self, tag, attributes):
        self.open.append(tag)
        if tag in ("td", "th", "caption"):
            self.texts.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts[-1] += data


def test_in_a_notebook_it_is_a_table():
    page = Cells()
    page.feed(FOUND._repr_html_())
    assert page.open == []
    assert page.texts[:5] == ["5 objects", "name", "score", "other names", "box: x0, y0, x1, y1"]
    assert page.texts[9:13] == ["■ cup <&>", "0.80", "cup <&> 1, other 1", "30, 5, 40, 25"]
    assert page.texts[17].startswith("■ ?")
    assert f"rgb{colour_of('red star')}" in FOUND._repr_html_()
    many = some(["cat"] * (SHOWN + 1))._repr_html_()
    assert f"{SHOWN + 1} objects, the best {SHOWN} of them" in many
    assert many.count("<tr>") == SHOWN + 1
    assert "0 objects" in NOTHING._repr_html_()


def annotations(found, category_ids):
    """The truth of one image in which every box with a category is right."""
    entries = [
        {
            "id": 1 + number,
            "image_id": 3,
            "category_id": category_ids[name],
            "bbox": [float(x0), float(y0), float(x1 - x0), float(y1 - y0)],
            "area": 200.0,
            "iscrowd": 0,
        }
        for number, (name, (x0, y0, x1, y1)) in enumerate(zip(found.names, found.boxes, strict=True))
        if name in category_ids
    ]
    image = {"id": 3, "width": 200, "height": 50, "neg_category_ids": [], "not_exhaustive_category_ids": []}
    categories = [{"id": id, "name": name, "frequency": "f"} for name, id in category_ids.items()]
    return {"images": [image], "annotations": entries, "categories": categories}


CATEGORIES = {"red star": 4, "日本": 9}


@pytest.fixture
def truth(tmp_path):
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(annotations(FOUND, CATEGORIES)))
    return path


@pytest.mark.parametrize(("category_ids", "wanted"), [(CATEGORIES, [4, -1, 4, -1, 9]), (None, [-1] * 5)])
def test_entries_of_a_results_file(tmp_path, truth, category_ids, wanted):
    entries = FOUND.to_coco(np.int64(3), category_ids and {name: np.int64(id) for name, id in category_ids.items()})
    assert [entry["category_id"] for entry in entries] == wanted
    assert entries[1]["bbox"] == [30.0, 5.0, 10.0, 20.0]
    assert entries[1]["names"] == ["cup <&>", "cup <&> 1", "other 1"]
    assert entries[1]["name_scores"] == [-2.0, -3.0, -4.0]
    assert [entry["score"] for entry in entries] == FOUND.scores.tolist()
    (tmp_path / "results.json").write_text(json.dumps(entries))
    results = read_results(tmp_path / "results.json", {3}, set(CATEGORIES.values()))
    assert results.detections.category_ids.tolist() == wanted
    assert results.detections.names == NAMES
    assert NOTHING.to_coco(3) == []


def test_pycocotools_scores_them(tmp_path, truth, capsys):
    entries = FOUND.to_coco(3, CATEGORIES)
    coco = COCO(str(truth))
    run = COCOeval(coco, coco.loadRes(entries), "bbox")
    run.evaluate()
    run.accumulate()
    run.summarize()
    assert run.stats[0] == pytest.approx(1.0)
    assert len(coco.loadRes(FOUND.to_coco(3)).getAnnIds()) == 5


@pytest.mark.parametrize(("category_ids", "matched"), [(CATEGORIES, 3), (None, 0)])
def test_lvis_takes_them(tmp_path, truth, category_ids, matched):
    (tmp_path / "results.json").write_text(json.dumps(FOUND.to_coco(3, category_ids)))
    results = LVISResults(LVIS(str(truth)), str(tmp_path / "results.json"))
    assert len(results.get_ann_ids()) == 5
    evaluation = LVISEval(LVIS(str(truth)), results, "bbox")
    evaluation.evaluate()
    of_all_areas = [each for each in evaluation.eval_imgs if each and each["area_rng"] == evaluation.params.area_rng[0]]
    assert sum(np.count_nonzero(each["dt_matches"][0]) for each in of_all_areas) == matched


def consistent(found):
    """Each row has the name, the other names and the scores that belong together."""
    place = (-found["name_scores"][:, 0] - 1).astype(int)
    assert found["class_name"].tolist() == [NAMES[i] for i in place]
    assert found["alternatives"].tolist() == [FOUND.alternatives[i] for i in place]
    return place.tolist()


def test_for_supervision():
    found = FOUND.to_supervision()
    np.testing.assert_array_equal(found.xyxy, FOUND.boxes)
    np.testing.assert_array_equal(found.confidence, FOUND.scores)
    assert consistent(found) == [0, 1, 2, 3, 4]
    assert found["class_name"].dtype.kind == "U"
    assert found["alternatives"].shape == (5, 2)
    found.xyxy += 1
    found["name_scores"][:] = 0
    assert FOUND.boxes[0, 0] == 0
    assert FOUND.name_scores[0, 0] == -1


def test_ids_follow_from_names():
    ids = FOUND.to_supervision().class_id
    assert ids.dtype == np.int64
    assert ids[0] == ids[2]
    assert len(set(ids.tolist())) == 4
    assert ((ids >= 0) & (ids < 2**48)).all()
    assert some(["日本", "red star"]).to_supervision().class_id.tolist() == [ids[4], ids[0]]
    assert ids[0] == 243919859437028  # of every version and machine


def test_ids_are_places_in_a_list_that_grows():
    classes = ["cat"]
    assert FOUND.to_supervision(classes).class_id.tolist() == [1, 2, 1, 3, 4]
    assert some(["日本", "dog"]).to_supervision(classes).class_id.tolist() == [4, 5]
    assert NOTHING.to_supervision(classes).class_id.dtype == np.int64
    assert classes == ["cat", "red star", "cup <&>", "", "日本", "dog"]
    with pytest.raises(InputError, match=r"^classes: 'cat' is there twice$"):
        FOUND.to_supervision(["cat", "dog", "cat"])


def test_threads_number_names_once():
    classes = []
    images = [some([f"name {number % 50}", f"name {number % 7}"]) for number in range(400)]
    with ThreadPoolExecutor(8) as threads:
        given = list(threads.map(lambda image: image.to_supervision(classes).class_id.tolist(), images))
    assert sorted(classes) == sorted({f"name {number}" for number in range(50)})
    assert all([classes[id] for id in ids] == image.names for ids, image in zip(given, images, strict=True))


def test_without_supervision(monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'opendet_jax\[supervision\]'$"):
        FOUND.to_supervision()


def test_supervision_keeps_rows_together():
    found = FOUND.to_supervision()
    assert consistent(found[found.confidence < 0.75]) == [2, 3, 4]
    merged = supervision.Detections.merge([found[3:], NOTHING.to_supervision(), found[:3]])
    assert consistent(merged) == [3, 4, 0, 1, 2]
    twice = supervision.Detections.merge([found, some(NAMES, shift=1).to_supervision()])
    for fewer in (twice.with_nms(0.5), twice.with_nmm(0.5), twice.with_nms(0.5, class_agnostic=True)):
        assert sorted(consistent(fewer)) == [0, 1, 2, 3, 4]
    assert sorted(consistent(twice.with_soft_nms())) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert len(NOTHING.to_supervision()["class_name"]) == 0


@pytest.mark.parametrize("first", [2**48 - 2, 2**47])
def test_supervision_tells_close_ids_apart(first):
    """They go through floats in suppression: 32 bits would take two classes for one."""
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 10]], np.float32)
    scores = np.array([0.9, 0.8], np.float32)
    found = supervision.Detections(boxes, confidence=scores, class_id=np.array([first, first + 1]))
    assert len(found.with_nms(0.5)) == len(found.with_nmm(0.5)) == 2
    found.class_id[:] = first
    assert len(found.with_nms(0.5)) == len(found.with_nmm(0.5)) == 1


def test_supervision_writes_the_names_on_the_picture():
    picture = np.full((60, 160, 3), 90, np.uint8)
    found = FOUND[:3].to_supervision()
    annotate = supervision.LabelAnnotator().annotate
    written = annotate(picture.copy(), found)
    np.testing.assert_array_equal(written, annotate(picture.copy(), found, labels=NAMES[:3]))
    assert (written != annotate(picture.copy(), found, labels=["", "", ""])).any()
    assert (supervision.BoxAnnotator().annotate(picture.copy(), found) != picture).any()


@pytest.mark.parametrize("workers", [1, 3])
def test_slices_come_together_with_one_numbering(workers):
    """The detector finds in every slice what is brightest there, and calls it by how bright it is."""
    picture = np.zeros((64, 192, 3), np.uint8)
    picture[20:30, 20:30], picture[20:30, 100:110], picture[20:30, 160:170] = 200, 100, 200

    def detect(tile):
        y, x = np.nonzero(tile[..., 0])
        if not len(x):
            return NOTHING.to_supervision(classes)
        box = np.array([[x.min(), y.min(), x.max() + 1, y.max() + 1]], np.float32)
        one = some(["bright" if tile.max() > 150 else "dim"])
        return Detections(box, one.scores, one.names, one.alternatives, one.name_scores).to_supervision(classes)

    classes = []
    slicer = supervision.InferenceSlicer(detect, slice_wh=64, overlap_wh=32, thread_workers=workers)
    found = slicer(picture)
    assert sorted(found.xyxy[:, 0].tolist()) == [20, 100, 160]
    assert sorted(classes) == ["bright", "dim"]
    named = {classes[id] for id in found.class_id[np.isin(found.xyxy[:, 0], [20, 160])]}
    assert named == {"bright"}


def test_tracks_keep_names_and_empty_frames_have_none():
    tracker = ByteTrackTracker(track_activation_threshold=0.4, high_conf_det_threshold=0.4)
    tracked = [tracker.update(some(NAMES, shift=float(number)).to_supervision()) for number in range(4)]
    assert (tracked[0].tracker_id == -1).all()
    places = [dict(zip(frame.tracker_id.tolist(), consistent(frame), strict=True)) for frame in tracked[1:]]
    assert all(before == after for before, after in pairwise(places))
    assert len(places[0]) == 5
    empty = tracker.update(NOTHING.to_supervision())
    assert (len(empty), empty["class_name"], list(empty)) == (0, None, [])  # as docs/python.md says


def test_a_data_set_wants_places():
    with pytest.raises(ValueError, match="outside the valid range"):
        supervision.DetectionDataset(["red star"], ["a.png"], {"a.png": some(["red star"]).to_supervision()})
