"""Greedy matching of one image's detections with its objects, by the rules that LVIS and COCO share.

The packages match anew for each of 10 IoU thresholds and each of 4 ranges of area. Here all 40 matchings are made at
once: each is one bit of an integer, `10·area + threshold`, and a set of matchings is one integer.

Method: docs/method.md#13-evaluation.
"""

from dataclasses import dataclass

import numpy as np
import pycocotools.mask
from jaxtyping import Bool, Float64, Int64, UInt64
from numpy import ndarray

THRESHOLDS = np.linspace(0.5, 0.95, 10)
AREAS = {"all": (0, 1e10), "small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 1e10)}  # px², both included
MATCHINGS = len(AREAS) * len(THRESHOLDS)
ALL = 2**MATCHINGS - 1
AT_50 = 1  # the matching at IoU 0.5, whatever the area
_OF_ONE_AREA = 2 ** len(THRESHOLDS) - 1
_REACHED = np.array(  # the matchings whose threshold an IoU reaches, by the number of thresholds that it reaches
    [
        sum((2**count - 1) << (place * len(THRESHOLDS)) for place in range(len(AREAS)))
        for count in range(len(THRESHOLDS) + 1)
    ],
    np.uint64,
)


@dataclass(frozen=True)
class TruthBoxes:
    """The true boxes of one image, in their json's order."""

    category: Int64[ndarray, " m"]
    boxes: Float64[ndarray, "m 4"]  # x, y, w, h
    wanted: UInt64[ndarray, " m"]  # the matchings in which it is to be found; in the others it is to be ignored
    crowd: Bool[ndarray, " m"]  # matches any number of detections; IoU is over the detection's own area


@dataclass(frozen=True)
class Outcome:
    """What n detections are, in each of the matchings; where neither true nor false, they do not count."""

    true: UInt64[ndarray, " n"]
    false: UInt64[ndarray, " n"]
    found: Int64[ndarray, " n"]  # the object that it finds in the matching AT_50, or −1


def within_areas(areas: Float64[ndarray, " n"]) -> UInt64[ndarray, " n"]:
    """The matchings whose range of area holds each area."""
    bits = np.zeros(len(areas), np.uint64)
    for place, (low, high) in enumerate(AREAS.values()):
        inside = (areas >= low) & (areas <= high)
        bits |= np.where(inside, np.uint64(_OF_ONE_AREA << (place * len(THRESHOLDS))), np.uint64(0))
    return bits


def match(
    category: Int64[ndarray, " n"],
    boxes: Float64[ndarray, "n 4"],
    lenient: Bool[ndarray, " n"],
    objects: TruthBoxes,
) -> Outcome:
    """Detections, best first, take what is left of the objects of their class; `boxes` are x, y, w, h.

    Each takes the free object of highest IoU that reaches the threshold (of equal ones the last), one to be ignored
    only where no wanted one can be had. A detection without an object is false, unless it is `lenient` (its class is
    not annotated exhaustively in this image) or outside the range of area.

    What a detection takes depends on better ones only: those below a limit, on an image's or a class's detections, may
    be matched or left out, and the outcome of those above is the same.
    """
    free, crowd = [ALL] * len(objects.boxes), objects.crowd.tolist()
    unmatched, true = [ALL] * len(boxes), [0] * len(boxes)
    found = [-1] * len(boxes)
    for detection, place, wanted, matchings in _offers(category, boxes, objects):
        taken = matchings & free[place] & unmatched[detection]
        if taken:
            unmatched[detection] &= ~taken
            if not crowd[place]:
                free[place] &= ~taken
            if wanted:
                true[detection] |= taken
                if taken & AT_50:
                    found[detection] = place
    counted = np.where(lenient, np.uint64(0), within_areas(boxes[:, 2] * boxes[:, 3]))
    false = np.array(unmatched, np.uint64) & counted
    return Outcome(np.array(true, np.uint64), false, np.array(found, np.int64))


def _offers(
    category: Int64[ndarray, " n"], boxes: Float64[ndarray, "n 4"], objects: TruthBoxes
) -> list[tuple[int, int, int, int]]:
    """(detection, object, 1 if wanted, matchings), in the order in which they are to be tried."""
    if not len(boxes) or not len(objects.boxes):
        return []
    iou = np.asarray(pycocotools.mask.iou(boxes, objects.boxes, objects.crowd.astype(np.uint8)))
    detection, place = np.nonzero((iou >= THRESHOLDS[0]) & (category[:, None] == objects.category))
    value = iou[detection, place]
    reached = _REACHED[np.searchsorted(THRESHOLDS, value, side="right")]
    # Every pair is offered where the object is wanted, and again where it is ignored.
    wanted = objects.wanted[place]
    matchings = np.concatenate([reached & wanted, reached & ~wanted])
    kind = np.repeat([1, 0], len(detection))
    detection, place, value = (np.tile(column, 2) for column in (detection, place, value))
    order = np.lexsort((-place, -value, -kind, detection))
    order = order[matchings[order] > 0]
    return list(zip(*(column[order].tolist() for column in (detection, place, kind, matchings)), strict=True))
