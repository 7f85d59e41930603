"""LVIS's average precision by both protocols, and localisation and naming measured apart.

The matching of boxes is the lvis package's own. Replaced are the parts that need files, a removed NumPy name or
exactly three frequency groups: a class may also be of group "u" (never seen in training), reported apart and not
part of AP, or of no group at all (""; data without frequencies), part of AP only.
"""

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from lvis import LVIS, LVISEval, LVISResults

Metrics = dict[str, float | None]

PER_IMAGE = 300  # detections of an image, LVIS's own protocol
PER_CLASS = 10_000  # detections of a class over the data set, the protocol "fixed"
AREAS = ("all", "small", "medium", "large")
IN_AP = ("r", "c", "f", "")
GROUPS: tuple[str, ...] = (*IN_AP, "u")
_quiet = logging.getLogger(__name__)
_quiet.setLevel(logging.WARNING)


class _Truth(LVIS):
    def __init__(self, dataset: dict):
        self.logger = _quiet
        self.dataset = dataset
        self._create_index()


class _Detections(LVISResults):
    def __init__(self, truth: _Truth, detections: Sequence[Mapping[str, Any]]):
        self.logger = _quiet
        kept = [dict(detection) for detection in detections]
        for number, detection in enumerate(kept, 1):  # 0 would read as "unmatched"
            detection["id"] = number
            detection["area"] = detection["bbox"][2] * detection["bbox"][3]
        self.dataset = {**truth.dataset, "annotations": kept}
        self._create_index()
        strangers = {detection["image_id"] for detection in kept} - set(self.imgs)
        if strangers:
            raise ValueError(f"detections on images that are not in the data set: {sorted(strangers)[:5]}")


class _Evaluation(LVISEval):
    def __init__(self, truth: dict, detections: Sequence[Mapping[str, Any]], areas: Sequence[str] = AREAS):
        """`truth` in LVIS's form; `detections` with image_id, category_id, bbox (x, y, w, h in pixels) and score."""
        truth_index = _Truth(_numbered(truth))
        super().__init__(truth_index, _Detections(truth_index, detections), "bbox")
        self.logger = _quiet
        self.params.img_count_lbl = list(GROUPS)
        self.params.area_rng = [self.params.area_rng[AREAS.index(area)] for area in areas]
        self.params.area_rng_lbl = list(areas)
        self.evaluate()
        self.precision = self._precision()

    def _precision(self) -> Float[np.ndarray, "thresholds recalls classes areas"]:
        """Interpolated precision; −1 for a class (and area) without a box to find."""
        params = self.params
        classes, areas, images = len(params.cat_ids), len(params.area_rng), len(params.img_ids)
        precision = -np.ones((len(params.iou_thrs), len(params.rec_thrs), classes, areas))
        for place in range(classes * areas):  # eval_imgs runs over classes, then areas, then images
            entries = self.eval_imgs[place * images : (place + 1) * images]
            entries = [entry for entry in entries if entry is not None]
            wanted = sum(int(np.count_nonzero(entry["gt_ignore"] == 0)) for entry in entries)
            if wanted:
                precision[:, :, place // areas, place % areas] = self._interpolated(entries, wanted)
        return precision

    def _interpolated(self, entries: list[dict], wanted: int) -> Float[np.ndarray, "thresholds recalls"]:
        """Highest precision at or beyond each recall, 0 beyond the last recall reached, for one class."""
        scores = np.concatenate([entry["dt_scores"] for entry in entries])
        best_first = np.argsort(-scores, kind="mergesort")
        matched = np.concatenate([entry["dt_matches"] for entry in entries], axis=1)[:, best_first] > 0
        counted = ~np.concatenate([entry["dt_ignore"] for entry in entries], axis=1)[:, best_first].astype(bool)
        true = np.cumsum(matched & counted, axis=1)
        false = np.cumsum(~matched & counted, axis=1)
        precision = true / (true + false + np.spacing(1))
        highest_beyond = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        padded = np.pad(highest_beyond, ((0, 0), (0, 1)))
        recall_at = [np.searchsorted(recall, self.params.rec_thrs, side="left") for recall in true / wanted]
        return np.take_along_axis(padded, np.stack(recall_at), axis=1)

    def average_precision(
        self, groups: Sequence[str] = IN_AP, iou: float | None = None, area: str = "all"
    ) -> float | None:
        """Mean over IoU 0.5…0.95 (or one of them), recalls and the groups' classes; None with nothing to find."""
        classes = [place for group in groups for place in self.freq_groups[self.params.img_count_lbl.index(group)]]
        precision = self.precision[:, :, classes, self.params.area_rng_lbl.index(area)]
        if iou is not None:
            precision = precision[np.isclose(self.params.iou_thrs, iou)]
        defined = precision[precision > -1]
        return float(defined.mean()) if defined.size else None


def _numbered(truth: dict) -> dict:
    """A copy whose boxes count from 1 (the package reads id 0 as "unmatched") and whose classes all name a group."""
    annotations = [{**annotation, "id": number} for number, annotation in enumerate(truth["annotations"], 1)]
    frequencies = [category.get("frequency") for category in truth["categories"]]
    categories = [
        {**category, "frequency": frequency if frequency in GROUPS else ""}
        for category, frequency in zip(truth["categories"], frequencies, strict=True)
    ]
    return {**truth, "annotations": annotations, "categories": categories}


def best_of_each(key: str, limit: int, detections: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """At most `limit` detections with the same `key`, the best; of equal scores the earlier."""
    groups = defaultdict(list)
    for detection in detections:
        groups[detection[key]].append(detection)
    ranked = (sorted(group, key=lambda detection: -detection["score"]) for group in groups.values())
    return [detection for group in ranked for detection in group[:limit]]


def average_precisions(truth: dict, detections: Sequence[Mapping[str, Any]]) -> Metrics:
    """AP and its parts, over boxes named by class, by LVIS's protocol and ("fixed_…") by fixed AP (method section 13).

    A detection of category −1 takes one of the 300 places of its image and matches nothing.
    `truth` has LVIS's "images" (with neg_category_ids and not_exhaustive_category_ids), "annotations" (with bbox and
    area) and "categories".
    """
    per_image = best_of_each("image_id", PER_IMAGE, detections)
    lvis = _Evaluation(truth, per_image).average_precision
    per_class = best_of_each("category_id", PER_CLASS, detections)
    # Where neither limit removes anything, the protocols are one.
    same = len(per_image) == len(per_class) == len(detections)
    fixed = lvis if same else _Evaluation(truth, per_class, areas=("all",)).average_precision
    return {
        "AP": lvis(),
        "AP50": lvis(iou=0.5),
        "AP75": lvis(iou=0.75),
        "APr": lvis(["r"]),
        "APc": lvis(["c"]),
        "APf": lvis(["f"]),
        "APu": lvis(["u"]),
        "APs": lvis(area="small"),
        "APm": lvis(area="medium"),
        "APl": lvis(area="large"),
        "fixed_AP": fixed(),
        "fixed_APr": fixed(["r"]),
        "fixed_APc": fixed(["c"]),
        "fixed_APf": fixed(["f"]),
    }


def localisation_and_naming(truth: dict, detections: Sequence[Mapping[str, Any]]) -> Metrics:
    """How well objects are found whatever they are called, and how often those found (IoU ≥ 0.5) are named right.

    All classes are one here, and every detection counts, named or not: objects nobody annotated count as mistakes.
    """
    # 1 is looked for in every image, also where there is nothing.
    images = [{**image, "neg_category_ids": [1], "not_exhaustive_category_ids": []} for image in truth["images"]]
    annotations = [{**annotation, "category_id": 1} for annotation in truth["annotations"]]
    merged = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "object"}]}
    # What it was named is carried through the matching under a key that the evaluation does not read.
    best = best_of_each("image_id", PER_IMAGE, detections)
    unnamed = [{**detection, "category_id": 1, "named": detection["category_id"]} for detection in best]
    evaluation = _Evaluation(merged, unnamed, areas=("all",))
    classes = {number: annotation["category_id"] for number, annotation in enumerate(truth["annotations"], 1)}
    found = [
        (classes[int(match)], evaluation.lvis_dt.anns[detection]["named"])
        for entry in evaluation.eval_imgs
        if entry is not None
        for detection, match in zip(entry["dt_ids"], entry["dt_matches"][0], strict=True)
        if match > 0
    ]
    right = sum(true == named for true, named in found)
    return {
        "agnostic_AP": evaluation.average_precision(),
        "agnostic_AP50": evaluation.average_precision(iou=0.5),
        "recall50": len(found) / len(classes) if classes else None,
        "naming_accuracy": right / len(found) if found else None,
    }
