"""Names that several classes bear: which class a detection counts for.

Data sets are merged, and exported with a root class that has no box: then a name alone does not say a class. It is that
of the classes that has truth in the image, else the first that has any in the data set. Of several with truth in the
image it is that of the object which the detection overlaps most.

Method: docs/name_mapping.md.
"""

from dataclasses import replace

import numpy as np
import pycocotools.mask
from jaxtyping import Float64, Int64
from numpy import ndarray

from opendet_jax.evaluate.greedy_matching import AT_50, THRESHOLDS
from opendet_jax.evaluate.name_mapping import Bearers
from opendet_jax.evaluate.results import ScoredBoxes
from opendet_jax.evaluate.truth import ImageTruth, Truth


def settle(found: ScoredBoxes, image: ImageTruth, truth: Truth) -> ScoredBoxes:
    """Detections of an image with the one class that each counts for."""
    if found.shared is None:
        return found
    category_ids = found.category_ids.copy()
    for number in np.unique(found.shared[found.shared >= 0]).tolist():
        rows = np.flatnonzero(found.shared == number)
        places = _chosen(found.bearers[number], found.boxes[rows], image, truth)
        category_ids[rows] = truth.category_ids[places]
    return replace(found, category_ids=category_ids, shared=None)


def _chosen(bearers: Bearers, boxes: Float64[ndarray, "n 4"], image: ImageTruth, truth: Truth) -> Int64[ndarray, " n"]:
    """The class of each box, as its place in the truth."""
    groups = [truth.places(np.array(ids, np.int64)) for ids in bearers]
    present = [group[truth.wanted[group, 0] > 0] for group in groups]
    number = next((number for number, some in enumerate(present) if len(some)), 0)
    group, objects = groups[number], image.objects
    here = np.flatnonzero(np.isin(objects.category, group))
    if not len(here):
        return np.full(len(boxes), (present[number] if len(present[number]) else group)[0])
    wanted = objects.wanted[here] & np.uint64(AT_50) > 0
    iou = np.asarray(pycocotools.mask.iou(boxes, objects.boxes[here], objects.crowd[here].astype(np.uint8)))
    # What is to be ignored is taken only where nothing wanted can be had, as in matching.
    value = iou + (wanted & (iou >= THRESHOLDS[0]))
    first = np.lexsort((objects.category[here], ~wanted))  # of equal overlap, or none at all: wanted, smaller id
    return objects.category[here[first[np.argmax(value[:, first], axis=1)]]]
