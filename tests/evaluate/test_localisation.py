"""Finding and naming apart, by hand."""

import copy

import numpy as np
import pytest

from tests.evaluate.made_up import evaluate, exact_detections, metrics, small_truth


def test_localisation_does_not_read_names():
    truth = small_truth()
    found = exact_detections(truth)
    found[0]["category_id"] = 3  # wrong
    found[1]["category_id"] = -1  # unnamed
    before = copy.deepcopy((truth, found))
    numbers = metrics(truth, found)
    assert (truth, found) == before
    assert numbers["agnostic_AP"] == numbers["agnostic_AP50"] == numbers["agnostic_AR"] == pytest.approx(1)
    assert numbers["recall50"] == 1
    assert numbers["naming_accuracy"] == 1 / 2
    # Classes 1 and 2 are missed; of class 3 the wrongly named box comes first, at the same score.
    assert numbers["AP"] == pytest.approx(0.5 / 3)


def test_localisation_by_hand():
    """Two of four boxes found, after a better-scored mistake: precision 1/2, 2/3 at recalls 1/4, 1/2."""
    truth = small_truth()
    found = exact_detections(truth)[:2]
    found.append({"image_id": 9, "category_id": -1, "bbox": [80, 0, 10, 10], "score": 0.9})
    numbers = metrics(truth, found)
    reached = np.sum(np.linspace(0, 1, 101) <= 0.5)
    assert numbers["agnostic_AP50"] == pytest.approx(reached * (2 / 3) / 101)
    assert numbers["agnostic_AR"] == numbers["recall50"] == 1 / 2
    assert numbers["naming_accuracy"] == 1


def test_detections_on_empty_images_are_mistakes():
    truth = small_truth()
    truth["annotations"] = truth["annotations"][:2]
    found = exact_detections(truth)
    found.append({"image_id": 9, "category_id": -1, "bbox": [80, 0, 10, 10], "score": 0.9})
    assert metrics(truth, found)["agnostic_AP50"] == pytest.approx(2 / 3)


def test_only_the_300_best_boxes_of_an_image_count():
    truth = small_truth()
    found = exact_detections(truth)[2:3]
    crowd = [{"image_id": 9, "category_id": 1, "bbox": [i, 0, 5, 5], "score": 0.9} for i in range(300)]
    assert metrics(truth, [*found, *crowd[1:]])["recall50"] == 1 / 4
    assert metrics(truth, [*found, *crowd])["recall50"] == 0


def named(truth, names):
    """Boxes of the four classes with these names; the class is that of the truth where the name is not ""."""
    return [
        {**detection, "names": [name, "second beam"], "category_id": detection["category_id"] if name else -1}
        for detection, name in zip(exact_detections(truth), names, strict=True)
    ]


def test_exact_names_and_synonyms():
    truth = small_truth()
    truth["categories"][1]["synonyms"] = ["n2", "Zwei_(2)"]
    found = named(truth, ["N1 ", "zwei (2)", "n1", ""])
    numbers = metrics(truth, found)
    assert numbers["naming_accuracy"] == 3 / 4  # by the class it was given, which here ignores the name
    assert numbers["exact_name_accuracy"] == 1 / 4
    assert numbers["synonym_accuracy"] == 2 / 4


def test_what_was_called_what():
    truth = small_truth()
    localisation = evaluate(truth, named(truth, ["N1 ", "n1", "n1", ""])).localisation
    assert localisation.called == {(0, "n1"): 1, (1, "n1"): 1, (2, "n1"): 1, (3, ""): 1}
    assert localisation.found.tolist() == [1, 1, 1, 1]
    assert localisation.of_its_class.tolist() == [1, 1, 1, 0]


def test_without_names_classes_are_what_boxes_are_called():
    truth = small_truth()
    found = exact_detections(truth)
    found[0]["category_id"], found[1]["category_id"] = 3, -1
    evaluation = evaluate(truth, found)
    assert evaluation.localisation.called == {(0, "n3"): 1, (1, ""): 1, (2, "n3"): 1, (3, "n4"): 1}
    assert evaluation.metrics["exact_name_accuracy"] is evaluation.metrics["synonym_accuracy"] is None


def test_what_is_ignored_is_neither_found_nor_a_mistake():
    truth = small_truth()
    truth["annotations"][0]["ignore"] = 1
    truth["annotations"][1]["iscrowd"] = 1
    found = exact_detections(truth)
    found += [{**found[1], "bbox": [20, 20, 30, 30]}]  # a part of the crowd
    numbers = metrics(truth, found)
    assert numbers["agnostic_AP"] == pytest.approx(1)
    assert numbers["recall50"] == 1
    assert numbers["naming_accuracy"] == 1
    assert metrics(truth, found[:2])["naming_accuracy"] is None


def test_images_by_how_well_they_went():
    """Right ones among as many of the best as there are objects."""
    truth = small_truth()
    found = exact_detections(truth)[:3]
    found.append({"image_id": 9, "category_id": 4, "bbox": [80, 0, 10, 10], "score": 0.9})
    found.append({"image_id": 9, "category_id": 4, "bbox": [0, 50, 20, 20], "score": 0.1})  # right, but the third
    scores = evaluate(truth, found).images
    assert [tuple(score) for score in scores] == [(7, 1.0, 2), (9, 0.5, 2)]
    assert [tuple(score) for score in evaluate(truth, found[:2]).images] == [(7, 1.0, 2), (9, 0.0, 2)]
