"""A data set's own annotations as the truth of an evaluation, ready for matching: classes and images by their place,
objects by image.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64
from numpy import ndarray

from opendet_jax.config import split_of
from opendet_jax.data.datasets import read_annotations
from opendet_jax.data.formats.json_stream import AnnotationError
from opendet_jax.data.formats.label_folders import LEFT_OUT, UNREADABLE, label_form
from opendet_jax.data.formats.lvis_form import is_described, lvis_form
from opendet_jax.data.formats.records import Dataset, Problems, flag
from opendet_jax.evaluate.greedy_matching import AREAS, AT_50, THRESHOLDS, TruthBoxes, within_areas
from opendet_jax.evaluate.name_mapping import normalise_name

SEEN_GROUPS = ("r", "c", "f", "")  # whose classes are part of AP
GROUPS = (*SEEN_GROUPS, "u")
# What `read_annotations` counts of images and categories; what it counts of annotations `lvis_truth` does in its way.
OF_THE_WHOLE = ("frequency is", "repeated", "file of another image id")
Content = dict[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class ImageTruth:
    place: int  # among the data set's images, by id
    objects: TruthBoxes
    judged: Int64[ndarray, " j"]  # classes known to be there or not: detections of others do not count
    lenient: Int64[ndarray, " k"]  # classes of which not every object is annotated

    def as_one_class(self) -> "ImageTruth":
        """Everything is an object, and looked for in every image."""
        one = replace(self.objects, category=np.zeros_like(self.objects.category))
        return ImageTruth(self.place, one, np.zeros(1, np.int64), np.zeros(0, np.int64))


class Truth:
    """Built from "images", "annotations" and "categories" in LVIS's form (see `lvis_truth`).

    federated: by LVIS's rules, a detection counts only where its class is known to be present or absent, and
    annotations with "ignore" are ignored. Otherwise by COCO's: every class is known everywhere, and only crowds
    ("iscrowd") are ignored.
    """

    def __init__(self, content: Mapping[str, Any], federated: bool = True):
        categories = {category["id"]: category for category in content["categories"]}
        self.categories = [categories[key] for key in sorted(categories)]
        self.category_ids = np.array(sorted(categories), np.int64)
        images = {image["id"]: image for image in content["images"]}
        self.image_ids = sorted(images)
        inside: dict[int, list[Mapping[str, Any]]] = {image_id: [] for image_id in self.image_ids}
        for annotation in content["annotations"]:
            if annotation["image_id"] in inside and annotation["category_id"] in categories:
                inside[annotation["image_id"]].append(annotation)
        everything = np.arange(len(self.categories))
        self.images: dict[int, ImageTruth] = {}
        for place, image_id in enumerate(self.image_ids):
            objects = self._objects(inside[image_id], federated)
            judged, lenient = everything, everything[:0]
            if federated:
                absent = images[image_id]["neg_category_ids"]
                judged = np.union1d(self._known(absent), objects.category)
                judged = everything if len(judged) == len(everything) else judged
                lenient = self._known(images[image_id]["not_exhaustive_category_ids"])
            self.images[image_id] = ImageTruth(place, objects, judged, lenient)

    def places(self, category_ids: Int64[ndarray, " n"]) -> Int64[ndarray, " n"]:
        """Of each class its place among all, by id; −1 for what is no class."""
        if not len(self.category_ids):
            return np.full(len(category_ids), -1)
        places = np.searchsorted(self.category_ids, category_ids).clip(max=len(self.category_ids) - 1)
        return np.where(self.category_ids[places] == category_ids, places, -1)

    def mask(self, places: Int64[ndarray, " k"]) -> Bool[ndarray, " classes"]:
        """Whether a class is one of `places`; never for −1, which is the last."""
        mask = np.zeros(len(self.categories) + 1, np.bool_)
        mask[places] = True
        return mask

    @cached_property
    def wanted(self) -> Int64[ndarray, "C areas"]:
        """Objects to be found, by class and range of area."""
        return wanted([image.objects for image in self.images.values()], len(self.categories))

    @cached_property
    def groups(self) -> list[str]:
        """The frequency group of each class; "" where there is none."""
        given = (category.get("frequency") for category in self.categories)
        return [group if group in GROUPS else "" for group in given]

    @property
    def is_coco(self) -> bool:
        """Whether COCO's protocol is meant for it: every class known in every image, no frequencies."""
        complete = (
            len(image.judged) == len(self.categories) and not len(image.lenient) for image in self.images.values()
        )
        return not any(self.groups) and all(complete)

    def classes_of(self, groups: Sequence[str]) -> Int64[ndarray, " k"]:
        return np.flatnonzero(np.isin(self.groups, groups))

    def _known(self, category_ids: Sequence[int]) -> Int64[ndarray, " k"]:
        places = np.unique(self.places(np.array(category_ids, np.int64)))
        return places[places >= 0]

    def _objects(self, annotations: Sequence[Mapping[str, Any]], federated: bool) -> TruthBoxes:
        crowd = np.array([bool(annotation.get("iscrowd")) for annotation in annotations], np.bool_)
        given = np.array([bool(annotation.get("ignore")) for annotation in annotations], np.bool_)
        ignored = crowd | given if federated else crowd
        areas = within_areas(np.array([annotation["area"] for annotation in annotations], np.float64))
        return TruthBoxes(
            category=self.places(np.array([annotation["category_id"] for annotation in annotations], np.int64)),
            boxes=np.array([annotation["bbox"] for annotation in annotations], np.float64).reshape(-1, 4),
            wanted=np.where(ignored, np.uint64(0), areas),
            crowd=crowd,
        )


def wanted(images: Sequence[TruthBoxes], classes: int) -> Int64[ndarray, "C areas"]:
    """Objects to be found, by class and range of area."""
    counts = np.zeros((classes, len(AREAS)), np.int64)
    for objects in images:
        for area in range(len(AREAS)):
            there = objects.wanted & np.uint64(AT_50 << (area * len(THRESHOLDS))) > 0
            np.add.at(counts[:, area], objects.category[there], 1)
    return counts


def lvis_truth(dataset: Dataset, strict: bool = False, problems: Problems | None = None) -> Content:
    """Images, annotations and categories in LVIS's form, of the data set's images only, with the json's own areas.

    A json in COCO's form says everything about every image: a class without a box there is absent. Its crowd regions
    are neither to be found nor a mistake. A box without area counts as an object that nothing finds, as in the lvis and
    pycocotools packages. An annotation that cannot be used is passed over or, if `strict`, an error; one of a class
    without a name is passed over too, as nothing can be called it, but not if `strict`. What is passed over, or used
    otherwise than it is written, is counted in `problems`.
    Raises AnnotationError.
    """
    problems = Problems() if problems is None else problems
    content = {part: list(entries) for part, entries in lvis_form(dataset)}
    classes = [category.id for category in dataset.categories]  # one list for all images that have none
    known, wanted = set(classes), {record.image_id for record in dataset.records}
    images = []
    for image in content["images"]:
        if image["id"] in wanted:
            absent = _classes(dataset, image, "neg_category_ids", known, problems)
            lenient = _classes(dataset, image, "not_exhaustive_category_ids", known, problems)
            absent = classes if absent is None else absent
            images.append({"id": image["id"], "neg_category_ids": absent, "not_exhaustive_category_ids": lenient or []})
    annotations = [
        _object(annotation, where, problems)
        for where, annotation in _usable(dataset, content["annotations"], strict, problems)
    ]
    categories = [
        {"id": c.id, "name": c.name, "synonyms": list(c.synonyms), "frequency": c.frequency} for c in dataset.categories
    ]
    return {"images": images, "annotations": annotations, "categories": categories}


def read_truth(annotations: Path, images: Path | None, minival: bool) -> tuple[Dataset, Content, Problems]:
    """Annotations in any form of `read_annotations`, every one of which must be usable; what `lvis_truth` counted.

    Of a YOLO or VOC folder it is the split "val" unless another is named, and what was counted in reading it.
    Raises AnnotationError.
    """
    root = images or ("" if label_form(split_of(annotations)[0]) else annotations.parent)
    dataset, problems = read_annotations(annotations, root, minival=minival, split="val")
    for kind in ("unknown image id", "unknown category id", UNREADABLE, LEFT_OUT):
        if kind in problems.counts:
            raise AnnotationError(f"{annotations}: {kind}: {problems.examples[kind][0]}")
    if not len(dataset):
        raise AnnotationError(f"{annotations}: there is no image to evaluate on")
    if not is_described(dataset):
        problems = problems.of_kinds(*OF_THE_WHOLE)
    return dataset, lvis_truth(dataset, strict=True, problems=problems), problems


def is_number(value: Any) -> bool:
    """Whether a json's value is a finite number that float64 can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def is_box(bbox: Any) -> bool:
    """Whether it is x, y, width, height; the last two may be 0."""
    return isinstance(bbox, list) and len(bbox) == 4 and all(map(is_number, bbox)) and min(bbox[2:]) >= 0


def _usable(
    dataset: Dataset, annotations: list[dict[str, Any]], strict: bool, problems: Problems
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each with how messages name it."""
    names = {category.id: normalise_name(category.name) for category in dataset.categories}
    ids = set()
    for annotation in annotations:
        kind, fault = "", ""
        category_id, number = annotation["category_id"], annotation.get("id")
        if type(category_id) is not int or category_id not in names:
            kind, fault = "unknown category id", f"unknown category id {category_id!r:.40}"
        elif not is_box(annotation["bbox"]):
            kind, fault = "box that is none", f"bbox {annotation['bbox']!r:.80} is not x, y, width, height"
        elif not strict and not names[category_id]:
            kind, fault = "class without a name", f"class {category_id}"
        elif strict and type(number) is int:
            kind = fault = "the id occurs twice" if number in ids else ""
            ids.add(number)
        where = f"annotation {number!r:.40} of image {annotation['image_id']}"
        if not kind:
            yield where, annotation
        elif strict:
            raise AnnotationError(f"{dataset.annotations}: {where}: {fault}")
        else:
            problems.add(f"{kind}, passed over", f"{where}: {fault}")


def _object(annotation: dict[str, Any], where: str, problems: Problems) -> dict[str, Any]:
    crowd = flag(annotation, "iscrowd", problems, where)
    ignored = flag(annotation, "ignore", problems, where) or crowd
    return {
        "image_id": annotation["image_id"],
        "category_id": annotation["category_id"],
        "bbox": annotation["bbox"],
        "area": _area(annotation, where, problems),
        "ignore": int(ignored),
        "iscrowd": int(crowd),
    }


def _area(annotation: dict[str, Any], where: str, problems: Problems) -> float:
    """The json's, or the box's where that is missing or none. What is beyond the ranges of AREAS is ignored."""
    width, height = annotation["bbox"][2:]
    of_box, given = float(width) * float(height), annotation.get("area")
    largest = AREAS["all"][1]
    if given is None:
        area = of_box
    elif is_number(given) and 0 <= given <= max(largest, of_box):
        area = float(given)
    else:
        problems.add("area that is none, the box's taken", f"{where}: {given!r:.40}")
        area = of_box
    if area > largest:
        problems.add("larger than 1e10 square pixels, ignored", f"{where}: {area:g}")
    return area


def _classes(
    dataset: Dataset, image: dict[str, Any], field: str, known: set[int], problems: Problems
) -> list[int] | None:
    """One of the lists of LVIS's images, or None."""
    listed = image.get(field)
    if listed is None:
        return None
    if not isinstance(listed, list) or not all(type(number) is int for number in listed):
        raise AnnotationError(
            f"{dataset.annotations}: image {image['id']}: {field} is {listed!r:.40}, not a list of ids"
        )
    if known.issuperset(listed):
        return listed
    unknown = [number for number in listed if number not in known]
    problems.add(f"unknown category id in {field}, left out", f"image {image['id']}: {unknown[0]!r:.40}", len(unknown))
    return [number for number in listed if number in known]
