"""Matching against a loop that does what it says, one matching at a time, and what follows from its order."""

import numpy as np
import pycocotools.mask
import pytest

from opendet_jax.evaluate.greedy_matching import AREAS, AT_50, THRESHOLDS, TruthBoxes, match, within_areas


def boxes_around(rng, count):
    """Few places, so that many overlap, some exactly alike."""
    corners = rng.integers(0, 6, (count, 2)) * 20.0
    sizes = rng.choice([20.0, 40.0, 60.0, 200.0], (count, 2))
    return np.concatenate([corners, sizes], axis=1)


def objects_like(rng, count):
    boxes, crowd = boxes_around(rng, count), rng.uniform(size=count) < 0.2
    ignored = crowd | (rng.uniform(size=count) < 0.2)
    wanted = np.where(ignored, np.uint64(0), within_areas(boxes[:, 2] * boxes[:, 3]))
    return TruthBoxes(rng.integers(0, 2, count), boxes, wanted, crowd)


def one_matching(category, boxes, lenient, objects, iou_threshold, area):
    """What each detection is: "true", "false" or "", by the definition."""
    iou = pycocotools.mask.iou(boxes, objects.boxes, objects.crowd.astype(np.uint8))
    low, high = AREAS[area]
    sizes = objects.boxes[:, 2] * objects.boxes[:, 3]
    counts = (objects.wanted > 0) & (sizes >= low) & (sizes <= high)
    free = np.ones(len(sizes), bool)
    kinds = []
    for row, own in enumerate(category):
        for wanted in (True, False):
            can = (objects.category == own) & (counts == wanted) & (free | objects.crowd) & (iou[row] >= iou_threshold)
            if can.any():
                best = max(np.flatnonzero(can), key=lambda place: (iou[row][place], place))
                free[best] = False
                kinds.append("true" if wanted else "")
                break
        else:
            size = boxes[row, 2] * boxes[row, 3]
            kinds.append("" if lenient[row] or not low <= size <= high else "false")
    return kinds


@pytest.mark.parametrize("seed", range(20))
def test_all_matchings_at_once_are_what_each_is_alone(seed):
    rng = np.random.default_rng([17, seed])
    objects = objects_like(rng, rng.integers(1, 12))
    count = rng.integers(1, 30)
    category, boxes = rng.integers(0, 2, count), boxes_around(rng, count)
    lenient = rng.uniform(size=count) < 0.1
    outcome = match(category, boxes, lenient, objects)
    for place, area in enumerate(AREAS):
        for threshold, iou_threshold in enumerate(THRESHOLDS):
            bit = np.uint64(1 << (place * len(THRESHOLDS) + threshold))
            kinds = one_matching(category, boxes, lenient, objects, iou_threshold, area)
            assert ((outcome.true & bit) > 0).tolist() == [kind == "true" for kind in kinds]
            assert ((outcome.false & bit) > 0).tolist() == [kind == "false" for kind in kinds]
    at_50 = (outcome.true & np.uint64(AT_50)) > 0
    assert (outcome.found >= 0).tolist() == at_50.tolist()
    assert (objects.category[outcome.found[at_50]] == category[at_50]).all()


@pytest.mark.parametrize("seed", range(5))
def test_what_comes_after_a_detection_does_not_change_it(seed):
    """So the limits of the protocols may be applied after matching as well as before."""
    rng = np.random.default_rng([19, seed])
    objects = objects_like(rng, 10)
    category, boxes = rng.integers(0, 2, 40), boxes_around(rng, 40)
    lenient = np.zeros(40, np.bool_)
    whole = match(category, boxes, lenient, objects)
    for count in (0, 1, 7, 25):
        part = match(category[:count], boxes[:count], lenient[:count], objects)
        np.testing.assert_array_equal(part.true, whole.true[:count])
        np.testing.assert_array_equal(part.false, whole.false[:count])
    one = category == 1  # and another class does not either
    np.testing.assert_array_equal(match(category[one], boxes[one], lenient[one], objects).true, whole.true[one])


def test_limits_of_areas_belong_to_both_ranges():
    assert [bin(bits) for bits in within_areas(np.array([32.0**2, 96.0**2, 1e10, 1.1e10])).tolist()] == [
        bin(0b0000000000_1111111111_1111111111_1111111111),
        bin(0b1111111111_1111111111_0000000000_1111111111),
        bin(0b1111111111_0000000000_0000000000_1111111111),
        bin(0),
    ]


def test_nothing_found_and_nothing_to_find():
    nothing = np.zeros(0, np.int64)
    objects = objects_like(np.random.default_rng(0), 3)
    assert len(match(nothing, np.zeros((0, 4)), np.zeros(0, np.bool_), objects).true) == 0
    none = TruthBoxes(nothing, np.zeros((0, 4)), np.zeros(0, np.uint64), np.zeros(0, np.bool_))
    outcome = match(np.zeros(1, np.int64), np.array([[0.0, 0, 5, 5]]), np.zeros(1, np.bool_), none)
    assert outcome.true.tolist() == [0]
    assert outcome.false.tolist() == within_areas(np.array([25.0])).tolist()
    assert outcome.found.tolist() == [-1]
