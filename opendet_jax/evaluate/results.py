"""Detections in the form of COCO's and LVIS's result files, with the generated names beside the class."""

from typing import Any

import numpy as np

from opendet_jax.evaluate.name_mapping import ExactMapping
from opendet_jax.inference import Found

Result = dict[str, Any]


def results_of(image_id: int, found: Found, mapping: ExactMapping) -> list[Result]:
    """One entry a detection, named by a class or not: category_id −1 says that the best name is no class.

    bbox is (x, y, width, height) in pixels, to a thousandth; names and their scores run from best to worst beam.
    """
    corners = found.boxes.astype(np.float64)
    boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1).round(3).tolist()
    scores = found.scores.tolist()
    name_scores = found.name_scores.astype(np.float64).round(5).tolist()
    return [
        {
            "image_id": image_id,
            "category_id": mapping(names[0]),
            "bbox": box,
            "score": score,
            "names": names,
            "name_scores": beams,
        }
        for box, score, names, beams in zip(boxes, scores, found.names, name_scores, strict=True)
    ]
