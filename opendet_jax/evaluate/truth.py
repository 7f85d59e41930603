"""A data set's own annotations as the truth of an evaluation."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from opendet_jax.data.annotations import read_annotations
from opendet_jax.data.json_stream import AnnotationError
from opendet_jax.data.lvis_form import lvis_form
from opendet_jax.data.records import Dataset

Content = dict[str, list[dict[str, Any]]]


def lvis_truth(dataset: Dataset, strict: bool = False) -> Content:
    """Images, annotations and categories in LVIS's form, of the data set's images only, with the json's own areas.

    A json in COCO's form says everything about every image: a class without a box there is absent. Its crowd regions
    are neither to be found nor a mistake. A box without area counts as an object that nothing finds, as in the lvis and
    pycocotools packages. An annotation that cannot be used is passed over or, if `strict`, an error.
    Raises AnnotationError.
    """
    content = {part: list(entries) for part, entries in lvis_form(dataset)}
    classes = [category.id for category in dataset.categories]
    wanted = {record.image_id for record in dataset.records}
    images = [
        {
            "id": image["id"],
            "neg_category_ids": _classes(dataset, image, "neg_category_ids", classes),
            "not_exhaustive_category_ids": _classes(dataset, image, "not_exhaustive_category_ids", []),
        }
        for image in content["images"]
        if image["id"] in wanted
    ]
    annotations = [
        {
            "image_id": annotation["image_id"],
            "category_id": annotation["category_id"],
            "bbox": annotation["bbox"],
            "area": annotation.get("area", annotation["bbox"][2] * annotation["bbox"][3]),
            "ignore": int(bool(annotation.get("iscrowd") or annotation.get("ignore"))),
            "iscrowd": int(bool(annotation.get("iscrowd"))),
        }
        for annotation in _usable(dataset, content["annotations"], strict)
        if annotation["image_id"] in wanted
    ]
    categories = [
        {"id": c.id, "name": c.name, "synonyms": list(c.synonyms), "frequency": c.frequency} for c in dataset.categories
    ]
    return {"images": images, "annotations": annotations, "categories": categories}


def read_truth(annotations: Path, images: Path, minival: bool) -> tuple[Dataset, Content]:
    """Annotations in any form of `read_annotations`, every one of which must be usable. Raises AnnotationError."""
    dataset, problems = read_annotations(annotations, images, minival=minival)
    for kind in ("unknown image id", "unknown category id"):
        if kind in problems.counts:
            raise AnnotationError(f"{annotations}: {kind}: {problems.examples[kind][0]}")
    if not len(dataset):
        raise AnnotationError(f"{annotations}: there is no image to evaluate on")
    return dataset, lvis_truth(dataset, strict=True)


def is_number(value: Any) -> bool:
    """Whether a json's value is a finite number that float64 can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def is_box(bbox: Any) -> bool:
    """Whether it is x, y, width, height; the last two may be 0."""
    return isinstance(bbox, list) and len(bbox) == 4 and all(map(is_number, bbox)) and min(bbox[2:]) >= 0


def _usable(dataset: Dataset, annotations: list[dict[str, Any]], strict: bool) -> Iterator[dict[str, Any]]:
    classes = {category.id for category in dataset.categories}
    ids = set()
    for annotation in annotations:
        problem = ""
        category_id, number = annotation["category_id"], annotation.get("id")
        if type(category_id) is not int or category_id not in classes:
            problem = f"unknown category id {category_id!r:.40}"
        elif not is_box(annotation["bbox"]):
            problem = f"bbox {annotation['bbox']!r:.80} is not x, y, width, height"
        elif not is_number(annotation.get("area", 0)) or annotation.get("area", 0) < 0:
            problem = f"area is {annotation['area']!r:.40}"
        elif strict and type(number) is int:
            problem = "the id occurs twice" if number in ids else ""
            ids.add(number)
        if not problem:
            yield annotation
        elif strict:
            where = f"annotation {number!r:.40} of image {annotation['image_id']}"
            raise AnnotationError(f"{dataset.annotations}: {where}: {problem}")


def _classes(dataset: Dataset, image: dict[str, Any], field: str, default: list[int]) -> list[int]:
    """Lists of LVIS's images; one list for all images that do not have it."""
    classes = image.get(field, default)
    if isinstance(classes, list) and all(type(number) is int for number in classes):
        return classes
    raise AnnotationError(f"{dataset.annotations}: image {image['id']}: {field} is {classes!r:.40}, not a list of ids")
