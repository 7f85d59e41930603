"""LVIS's two protocols against the lvis package itself, and against what can be computed by hand."""

import copy
import json
from functools import partial

import numpy as np
import pytest

from opendet_jax.evaluate.average_precision import BestOfEachClass, Outcomes, Uncounted
from opendet_jax.evaluate.protocols import LvisProtocols
from tests.evaluate.made_up import (
    detections_like,
    evaluate,
    exact_detections,
    metrics,
    random_truth,
    small_truth,
)
from tests.evaluate.packages import run_fixed, run_lvis


def load(path):
    return json.loads(path.read_text())


def assert_equal(ours, theirs, prefix=""):
    assert len(theirs) == 13
    for key, value in theirs.items():
        if value is None:
            assert ours[prefix + key] is None, key
        else:
            assert ours[prefix + key] == pytest.approx(value, abs=1e-9), key


@pytest.fixture(scope="module")
def fixture_path(data_folder):
    return data_folder / "fixtures/lvis_v0.5_val_100.json"


def test_perfect_detections_have_ap_one_and_stay_as_they_were(fixture_path):
    truth = load(fixture_path)
    found = detections_like(truth, np.random.default_rng(0))
    before = copy.deepcopy((truth, found))
    numbers = metrics(truth, found)
    assert (truth, found) == before
    for key in ("APu", "fixed_APu", "exact_name_accuracy", "synonym_accuracy"):
        assert numbers.pop(key) is None
    assert all(value == pytest.approx(1.0, abs=1e-9) for value in numbers.values()), numbers


def test_equals_the_package_on_lvis(fixture_path):
    truth = load(fixture_path)
    found = detections_like(truth, np.random.default_rng(1), wrong_class=0.3, shift=0.2, extra=8)
    ours, theirs = metrics(truth, found), run_lvis(fixture_path, found)
    assert 0.01 < ours["AP"] < 0.99
    assert_equal(ours, theirs)
    assert_equal(ours, run_fixed(fixture_path, found), "fixed_")


@pytest.mark.parametrize("crowded", [False, True])
def test_equals_the_package_on_minilvis_with_random_detections(data_folder, tmp_path, crowded):
    truth = load(data_folder / "minilvis/val.json")
    truth["images"] = truth["images"][:25]
    inside = {image["id"] for image in truth["images"]}
    truth["annotations"] = [a for a in truth["annotations"] if a["image_id"] in inside]
    (tmp_path / "part.json").write_text(json.dumps(truth))
    rng = np.random.default_rng(2)
    found = detections_like(truth, rng, 0.2, 0.3, 5)
    if crowded:  # more than the 300 an image may have: the worst go
        found += [{**d, "score": float(rng.uniform())} for d in detections_like(truth, rng, 0.5, 0.5, 310)]
    ours = metrics(truth, found)
    assert_equal(ours, run_lvis(tmp_path / "part.json", found))
    assert_equal(ours, run_fixed(tmp_path / "part.json", found), "fixed_")
    assert (ours["fixed_AP"] == ours["AP"]) is not crowded


@pytest.mark.parametrize("seed", range(4))
def test_equals_the_package_on_random_truths(tmp_path, seed):
    """With classes that are not judged or not exhaustive, ignored boxes, twins, ties in score and in IoU."""
    rng = np.random.default_rng([7, seed])
    truth = random_truth(rng, federated=True)
    for annotation in truth["annotations"]:
        del annotation["iscrowd"]
        annotation["ignore"] = int(rng.uniform() < 0.15)
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    found = detections_like(truth, rng, 0.3, 0.15, 15) + detections_like(truth, rng, 0.1, 0.4)
    found += [{**d, "score": float(rng.choice([0.25, 0.5]))} for d in found[::3]]  # the same boxes again
    ours = metrics(truth, found)
    assert 0.01 < ours["AP"] < 0.99
    assert_equal(ours, run_lvis(tmp_path / "truth.json", found))
    assert_equal(ours, run_fixed(tmp_path / "truth.json", found), "fixed_")


@pytest.mark.parametrize("limit", [1, 20, 60])
def test_fixed_ap_is_the_published_procedure(tmp_path, monkeypatch, limit):
    """The best of each class are chosen over the whole data set, those of images that do not judge it among them."""
    monkeypatch.setattr("opendet_jax.evaluate.evaluator.LvisProtocols", partial(LvisProtocols, per_class=limit))
    rng = np.random.default_rng(5)
    truth = random_truth(rng, federated=True)
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    classes = [category["id"] for category in truth["categories"]]
    found = detections_like(truth, rng, 0.3, 0.15, 15)
    found += [{**d, "category_id": int(rng.choice(classes))} for d in found]  # also where nothing is known of a class
    rng.shuffle(found)  # images and classes mixed: of equal scores the earlier in the file is chosen
    ours = metrics(truth, found)
    expected = run_fixed(tmp_path / "truth.json", found, limit)
    assert_equal(ours, expected, "fixed_")
    assert ours["fixed_AR"] < ours["AR"], "the limit costs something"


def test_pruning_on_the_way_changes_nothing():
    """The best of each class, chosen as detections come and all at once."""
    rng = np.random.default_rng(3)
    limit, classes, count = 25, 4, 900
    category = rng.integers(-1, classes, count).astype(np.int32)
    score = rng.choice(np.linspace(0, 1, 40), count)
    number, counts = rng.permutation(count), (rng.uniform(size=count) < 0.5) & (category >= 0)
    best = BestOfEachClass(classes, limit, pruned_after=60)
    for rows in np.split(np.arange(count), 30):
        known, others = rows[counts[rows]], rows[~counts[rows]]
        zeros = np.zeros(len(known), np.int32)
        none = np.zeros(len(known), np.uint64)
        columns = (category[known], score[known], zeros, zeros, number[known], none, none)
        best.add(Outcomes(*columns), Uncounted(category[others], score[others], number[others]))
    expected = set()
    for place in range(classes):
        own = sorted(np.flatnonzero(category == place), key=lambda row: (-score[row], number[row]))
        expected |= {int(number[row]) for row in own[:limit] if counts[row]}
    assert 0 < len(expected) < limit * classes
    assert set(best.best().number.tolist()) == expected


def test_never_seen_classes_are_apart():
    truth = small_truth()
    found = exact_detections(truth)
    only_unseen = metrics(truth, found[3:])
    assert only_unseen["AP"] == only_unseen["fixed_AP"] == only_unseen["AR"] == 0
    assert only_unseen["APu"] == only_unseen["fixed_APu"] == pytest.approx(1)
    only_seen = metrics(truth, found[:3])
    assert only_seen["AP"] == pytest.approx(1)
    assert only_seen["APu"] == 0
    assert metrics(truth, found[:1])["AP"] == pytest.approx(1 / 3)


def test_groups_without_a_box_are_none():
    truth = small_truth()
    truth["annotations"] = truth["annotations"][2:3]
    numbers = metrics(truth, exact_detections(truth))
    assert numbers["AP"] == numbers["APf"] == numbers["APs"] == pytest.approx(1)
    assert [numbers[key] for key in ("APr", "APc", "APu", "APm", "APl", "ARm")] == [None] * 6


def test_classes_without_frequency_count_in_ap_only():
    truth = small_truth()
    for category in truth["categories"]:
        del category["frequency"]
    numbers = metrics(truth, exact_detections(truth)[:3])
    assert numbers["AP"] == pytest.approx(3 / 4)
    assert numbers["APr"] is numbers["APc"] is numbers["APf"] is numbers["APu"] is None


def test_no_detections_and_no_objects():
    truth = small_truth()
    numbers = metrics(truth, [])
    assert {key for key, value in numbers.items() if value is None} == {
        "naming_accuracy",
        "exact_name_accuracy",
        "synonym_accuracy",
        "agnostic_ARl",
        *(f"{prefix}{key}" for prefix in ("", "fixed_") for key in ("APl", "ARl")),
    }
    assert {value for value in numbers.values() if value is not None} == {0}
    truth["annotations"] = []
    assert set(metrics(truth, []).values()) == {None}


def test_an_image_is_known_and_added_once():
    truth = small_truth()
    with pytest.raises(ValueError, match="not in the data set: 42"):
        evaluate(truth, [{"image_id": 42, "category_id": 1, "bbox": [0, 0, 1, 1], "score": 1.0}])


def test_the_unnamed_take_places_of_the_300():
    truth = small_truth()
    found = exact_detections(truth)[2:3]
    crowd = [{"image_id": 9, "category_id": -1, "bbox": [i, 0, 5, 5], "score": 0.9} for i in range(300)]
    assert metrics(truth, [*found, *crowd[:299]])["APf"] == pytest.approx(1)
    assert metrics(truth, [*found, *crowd])["APf"] == 0
    assert metrics(truth, [*found, *crowd])["fixed_APf"] == pytest.approx(1)
