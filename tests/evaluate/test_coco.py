"""COCO's protocol against pycocotools."""

import json

import numpy as np
import pytest

from opendet_jax.data.formats.json_source import read_json
from opendet_jax.evaluate.truth import lvis_truth
from tests.evaluate.made_up import detections_like, exact_detections, metrics, random_truth, small_truth
from tests.evaluate.packages import COCO_KEYS, run_coco


def assert_equal(ours, theirs, prefix=""):
    for key, value in theirs.items():
        if value is None:
            assert ours[prefix + key] is None, key
        else:
            assert ours[prefix + key] == pytest.approx(value, abs=1e-9), key


def without_frequencies(truth):
    """In COCO's form: no groups, no lists of classes that are absent."""
    for category in truth["categories"]:
        category.pop("frequency", None)
    for image in truth["images"]:
        image.pop("neg_category_ids", None)
        image.pop("not_exhaustive_category_ids", None)
    return truth


def with_every_class_known(truth):
    """The same as our reading of a json in COCO's form gives it (truth.py)."""
    classes = [category["id"] for category in truth["categories"]]
    images = [{**i, "neg_category_ids": classes, "not_exhaustive_category_ids": []} for i in truth["images"]]
    return {**truth, "images": images}


@pytest.mark.parametrize("seed", range(5))
def test_equals_pycocotools_with_crowds_and_many_detections(tmp_path, seed):
    """More than 100 of a class in an image, crowds matched again and again, ties in score and in IoU."""
    rng = np.random.default_rng([11, seed])
    truth = random_truth(rng, images=8, classes=3, crowds=0.2)
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    found = detections_like(truth, rng, 0.2, 0.15, 400 if seed == 0 else 30) + detections_like(truth, rng, 0.1, 0.4)
    found += [{**d, "score": float(rng.choice([0.25, 0.5]))} for d in found[::3]]  # the same boxes again
    rng.shuffle(found)
    theirs = run_coco(tmp_path / "truth.json", found)
    assert tuple(theirs) == COCO_KEYS
    assert 0.001 < theirs["AP"] < 0.99
    assert_equal(metrics(truth, found, "coco"), theirs)


def test_equals_pycocotools_on_lvis(data_folder, tmp_path):
    """LVIS's lists of classes are not looked at."""
    truth = json.loads((data_folder / "fixtures/lvis_v0.5_val_100.json").read_text())
    truth["images"] = truth["images"][:30]
    inside = {image["id"] for image in truth["images"]}
    truth["annotations"] = [{**a, "iscrowd": 0} for a in truth["annotations"] if a["image_id"] in inside]
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    found = detections_like(truth, np.random.default_rng(1), wrong_class=0.3, shift=0.2, extra=8)
    theirs = run_coco(tmp_path / "truth.json", found)
    assert 0.01 < theirs["AP"] < 0.99
    assert_equal(metrics(truth, found, "coco"), theirs)


def test_a_truth_in_cocos_form_has_cocos_numbers_beside_lvis(tmp_path):
    rng = np.random.default_rng(4)
    truth = without_frequencies(random_truth(rng, crowds=0.2))
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    found = detections_like(truth, rng, 0.3, 0.15, 15)
    ours = metrics(with_every_class_known(truth), found)
    assert_equal(ours, run_coco(tmp_path / "truth.json", found), "coco_")
    assert ours["AP"] == pytest.approx(ours["coco_AP"]), "the rules differ in their limits only"
    assert ours["APr"] is None
    assert not any(key.startswith("coco_") for key in metrics(small_truth(), []))


def test_beside_lvis_only_the_300_best_of_an_image_are_looked_at():
    truth = without_frequencies(small_truth())
    truth = with_every_class_known(truth)
    found = exact_detections(truth)[2:3]
    crowd = [{"image_id": 9, "category_id": 1 + i % 2, "bbox": [i, 0, 5, 5], "score": 0.9} for i in range(300)]
    assert metrics(truth, [*found, *crowd])["coco_AR100"] == 0
    assert metrics(truth, [*found, *crowd], "coco")["AR100"] == pytest.approx(1 / 4)


@pytest.mark.parametrize("seed", range(3))
def test_class_agnostic_numbers_equal_pycocotools(tmp_path, seed):
    """Whatever the truth's form; boxes that occur with several classes count once."""
    rng = np.random.default_rng([13, seed])
    truth = random_truth(rng, images=8, crowds=0.15, federated=True)
    found = detections_like(truth, rng, 0.3, 0.2, 20)
    one = {
        "images": truth["images"],
        "annotations": [{**annotation, "category_id": 1} for annotation in truth["annotations"]],
        "categories": [{"id": 1, "name": "object"}],
    }
    (tmp_path / "one.json").write_text(json.dumps(one))
    theirs = run_coco(tmp_path / "one.json", [{**d, "category_id": 1} for d in found], limit=300)
    theirs["AR"] = theirs["AR300"]
    theirs = {key: theirs[key] for key in ("AP", "AP50", "AP75", "AR", "ARs", "ARm", "ARl")}
    for results in (found, found + [{**d, "category_id": 2, "score": d["score"] / 2} for d in found]):
        assert_equal(metrics(truth, results), theirs, "agnostic_")


@pytest.mark.parametrize("protocol", ["lvis", "coco"])
def test_annotation_ids_from_0_give_the_numbers_of_ids_from_1(tmp_path, protocol):
    """pycocotools takes an id of 0 for "no match", and never finds that object."""
    rng = np.random.default_rng(6)
    truth = without_frequencies(random_truth(rng, crowds=0.1))
    found = exact_detections(truth)
    numbers = {}
    for first in (0, 1):
        for number, annotation in enumerate(truth["annotations"], first):
            annotation["id"] = number
        (tmp_path / f"{first}.json").write_text(json.dumps(truth))
        dataset, problems = read_json(tmp_path / f"{first}.json", tmp_path)
        assert problems.counts.keys() <= {"crowd region"}
        numbers[first] = metrics(lvis_truth(dataset), found, protocol)
    assert numbers[0] == numbers[1]
    assert numbers[0]["AP"] == pytest.approx(run_coco(tmp_path / "1.json", found)["AP"], abs=1e-9)
    assert numbers[0]["AP"] > run_coco(tmp_path / "0.json", found)["AP"]


def test_ignored_boxes_that_are_no_crowds_are_objects_to_coco_alone(tmp_path):
    """pycocotools takes "ignore" from "iscrowd", lvis from the json."""
    rng = np.random.default_rng(6)
    truth = without_frequencies(random_truth(rng, crowds=0.2))
    for annotation in truth["annotations"][::3]:
        annotation["ignore"] = 1
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    found = detections_like(truth, rng, 0.3, 0.15, 15)
    theirs = run_coco(tmp_path / "truth.json", found)
    ours = metrics(with_every_class_known(truth), found)
    assert_equal(ours, theirs, "coco_")
    assert_equal(metrics(truth, found, "coco"), theirs)
    assert abs(ours["AP"] - ours["coco_AP"]) > 0.01
