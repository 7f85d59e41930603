"""Our evaluation against the lvis package itself, and against what can be computed by hand."""

import copy
import json

import numpy as np
import pytest
from lvis import LVIS, LVISEval, LVISResults

from opendet_jax.evaluate.lvis import average_precisions, best_of_each, localisation_and_naming


def load(path):
    return json.loads(path.read_text())


def detections_like(truth, rng, wrong_class=0.0, shift=0.0, extra=0):
    """The true boxes moved by up to `shift` of their size, some of another class, and `extra` random ones an image."""
    classes = [category["id"] for category in truth["categories"]]
    found = []
    for annotation in truth["annotations"]:
        x, y, w, h = annotation["bbox"]
        dx, dy, dw, dh = rng.uniform(-shift, shift, 4)
        category = int(rng.choice(classes)) if rng.uniform() < wrong_class else annotation["category_id"]
        bbox = [x + dx * w, y + dy * h, w * (1 + dw), h * (1 + dh)]
        found.append({"image_id": annotation["image_id"], "category_id": category, "bbox": bbox})
    for image in truth["images"]:
        present = [a["category_id"] for a in truth["annotations"] if a["image_id"] == image["id"]]
        likely = present + image["neg_category_ids"] + image["not_exhaustive_category_ids"]
        for _ in range(extra if likely else 0):
            w, h = rng.uniform(5, image["width"]), rng.uniform(5, image["height"])
            x, y = rng.uniform(0, image["width"] - w), rng.uniform(0, image["height"] - h)
            bbox = [x, y, w, h]
            found.append({"image_id": image["id"], "category_id": int(rng.choice(likely)), "bbox": bbox})
    for detection in found:
        detection["bbox"] = [float(number) for number in detection["bbox"]]
        detection["score"] = float(rng.choice(np.linspace(0, 1, 200)))  # with ties
    return found


def by_the_package(path, detections, monkeypatch, max_dets=300):
    """The untouched package's numbers; it wants a name that NumPy dropped, and logs by a deprecated method."""
    monkeypatch.setattr(np, "float", float, raising=False)
    truth = LVIS(str(path))
    truth.logger.warn = truth.logger.warning
    monkeypatch.setattr("logging.Logger.warn", lambda *_: None)
    evaluation = LVISEval(truth, LVISResults(truth, copy.deepcopy(detections), max_dets), "bbox")
    evaluation.run()
    return {key: (None if value == -1 else value) for key, value in evaluation.get_results().items() if "AP" in key}


@pytest.fixture(scope="module")
def fixture_path(data_folder):
    return data_folder / "fixtures/lvis_v0.5_val_100.json"


def test_perfect_detections_have_ap_one_and_stay_as_they_were(fixture_path):
    truth = load(fixture_path)
    found = detections_like(truth, np.random.default_rng(0))
    before = copy.deepcopy((truth, found))
    metrics = average_precisions(truth, found)
    assert (truth, found) == before
    assert metrics.pop("APu") is None
    assert all(value == pytest.approx(1.0, abs=1e-9) for value in metrics.values()), metrics


def test_equals_the_package_on_lvis(fixture_path, monkeypatch):
    truth = load(fixture_path)
    found = detections_like(truth, np.random.default_rng(1), wrong_class=0.3, shift=0.2, extra=8)
    ours, theirs = average_precisions(truth, found), by_the_package(fixture_path, found, monkeypatch)
    assert 0.01 < ours["AP"] < 0.99
    assert theirs.keys() < ours.keys()
    for key, value in theirs.items():
        assert ours[key] == pytest.approx(value, abs=1e-9), key


@pytest.mark.parametrize("crowded", [False, True])
def test_equals_the_package_on_minilvis_with_random_detections(data_folder, monkeypatch, tmp_path, crowded):
    truth = load(data_folder / "minilvis/val.json")
    truth["images"] = truth["images"][:25]
    inside = {image["id"] for image in truth["images"]}
    truth["annotations"] = [a for a in truth["annotations"] if a["image_id"] in inside]
    (tmp_path / "part.json").write_text(json.dumps(truth))
    rng = np.random.default_rng(2)
    found = detections_like(truth, rng, 0.2, 0.3, 5)
    if crowded:  # more than the 300 an image may have: the worst go
        found += [{**d, "score": float(rng.uniform())} for d in detections_like(truth, rng, 0.5, 0.5, 310)]
    ours = average_precisions(truth, found)
    theirs = by_the_package(tmp_path / "part.json", found, monkeypatch)
    for key, value in theirs.items():
        assert ours[key] == pytest.approx(value, abs=1e-9), key
    fixed = by_the_package(tmp_path / "part.json", found, monkeypatch, max_dets=-1)
    for key in ("AP", "APr", "APc", "APf"):
        assert ours[f"fixed_{key}"] == pytest.approx(fixed[key], abs=1e-9), key
    assert (ours["fixed_AP"] == ours["AP"]) is not crowded


def small_truth():
    """Two images, four classes (r, c, f, u), a box of each."""
    categories = [{"id": i, "name": f"n{i}", "frequency": group} for i, group in enumerate("rcfu", 1)]
    images = [
        {"id": i, "width": 100, "height": 100, "neg_category_ids": [1, 2, 3, 4], "not_exhaustive_category_ids": []}
        for i in (7, 9)
    ]
    boxes = {1: [0, 0, 10, 10], 2: [20, 20, 40, 40], 3: [60, 60, 30, 30], 4: [0, 50, 20, 20]}
    annotations = [
        {"id": i, "image_id": 7 if i < 3 else 9, "category_id": i, "bbox": box, "area": box[2] * box[3]}
        for i, box in boxes.items()
    ]
    return {"images": images, "annotations": annotations, "categories": categories}


def exact_detections(truth):
    return [
        {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"], "score": 0.5}
        for a in truth["annotations"]
    ]


def test_never_seen_classes_are_apart():
    truth = small_truth()
    found = exact_detections(truth)
    only_unseen = average_precisions(truth, found[3:])
    assert only_unseen["AP"] == 0
    assert only_unseen["APu"] == pytest.approx(1)
    only_seen = average_precisions(truth, found[:3])
    assert only_seen["AP"] == pytest.approx(1)
    assert only_seen["APu"] == 0
    assert average_precisions(truth, found[:1])["AP"] == pytest.approx(1 / 3)


def test_groups_without_a_box_are_none():
    truth = small_truth()
    truth["annotations"] = truth["annotations"][2:3]
    metrics = average_precisions(truth, exact_detections(truth))
    assert metrics["AP"] == metrics["APf"] == metrics["APs"] == pytest.approx(1)
    assert [metrics[key] for key in ("APr", "APc", "APu", "APm", "APl")] == [None] * 5


def test_classes_without_frequency_count_in_ap_only():
    truth = small_truth()
    for category in truth["categories"]:
        del category["frequency"]
    metrics = average_precisions(truth, exact_detections(truth)[:3])
    assert metrics["AP"] == pytest.approx(3 / 4)
    assert metrics["APr"] is metrics["APc"] is metrics["APf"] is metrics["APu"] is None


def test_no_detections_and_no_objects():
    truth = small_truth()
    metrics = average_precisions(truth, [])
    assert metrics["AP"] == metrics["AP50"] == metrics["APr"] == metrics["APu"] == 0
    assert localisation_and_naming(truth, []) == {
        "agnostic_AP": 0,
        "agnostic_AP50": 0,
        "recall50": 0,
        "naming_accuracy": None,
    }
    truth["annotations"] = []
    assert set(average_precisions(truth, []).values()) == {None}
    assert set(localisation_and_naming(truth, []).values()) == {None}


def test_localisation_does_not_read_names():
    truth = small_truth()
    found = exact_detections(truth)
    found[0]["category_id"] = 3  # wrong
    found[1]["category_id"] = -1  # unnamed
    before = copy.deepcopy((truth, found))
    metrics = localisation_and_naming(truth, found)
    assert (truth, found) == before
    assert metrics["agnostic_AP"] == metrics["agnostic_AP50"] == pytest.approx(1)
    assert metrics["recall50"] == 1
    assert metrics["naming_accuracy"] == 1 / 2
    # Classes 1 and 2 are missed; of class 3 the wrongly named box comes first, at the same score.
    assert average_precisions(truth, found)["AP"] == pytest.approx(0.5 / 3)


def test_localisation_by_hand():
    """Two of four boxes found, after a better-scored mistake: precision 1/2, 2/3 at recalls 1/4, 1/2."""
    truth = small_truth()
    found = exact_detections(truth)[:2]
    found.append({"image_id": 9, "category_id": -1, "bbox": [80, 0, 10, 10], "score": 0.9})
    metrics = localisation_and_naming(truth, found)
    reached = np.sum(np.linspace(0, 1, 101) <= 0.5)
    assert metrics["agnostic_AP50"] == pytest.approx(reached * (2 / 3) / 101)
    assert metrics["recall50"] == 1 / 2
    assert metrics["naming_accuracy"] == 1


def test_detections_on_empty_images_are_mistakes():
    truth = small_truth()
    truth["annotations"] = truth["annotations"][:2]
    found = exact_detections(truth)
    found.append({"image_id": 9, "category_id": -1, "bbox": [80, 0, 10, 10], "score": 0.9})
    assert localisation_and_naming(truth, found)["agnostic_AP50"] == pytest.approx(2 / 3)


def test_the_best_of_each_class_are_kept():
    found = [{"category_id": c, "score": s} for c, s in ((1, 0.2), (1, 0.9), (2, 0.1), (1, 0.9), (1, 0.95))]
    assert best_of_each("category_id", 2, found) == [found[4], found[1], found[2]]


def test_unknown_image_is_refused():
    truth = small_truth()
    with pytest.raises(ValueError, match=r"not in the data set: \[42\]"):
        average_precisions(truth, [{"image_id": 42, "category_id": 1, "bbox": [0, 0, 1, 1], "score": 1.0}])
