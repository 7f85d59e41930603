"""A data set's own json as the truth of an evaluation."""

import json
import math
from typing import Any

from opendet_jax.data.records import Dataset


def lvis_truth(dataset: Dataset) -> dict[str, list[dict[str, Any]]]:
    """Images, annotations and categories in LVIS's form, of the data set's images only, with the json's own areas.

    A json in COCO's form says everything about every image: a class without a box there is absent. Its crowd regions
    are neither to be found nor a mistake.
    """
    content = json.loads(dataset.annotations.read_text(encoding="utf-8"))
    classes = [category.id for category in dataset.categories]
    wanted = {record.image_id for record in dataset.records}
    images = [
        {
            "id": image["id"],
            "neg_category_ids": image.get("neg_category_ids", classes),
            "not_exhaustive_category_ids": image.get("not_exhaustive_category_ids", []),
        }
        for image in content["images"]
        if image["id"] in wanted
    ]
    known = set(classes)
    annotations = [
        {
            "image_id": annotation["image_id"],
            "category_id": annotation["category_id"],
            "bbox": annotation["bbox"],
            "area": annotation.get("area", annotation["bbox"][2] * annotation["bbox"][3]),
            "ignore": int(bool(annotation.get("iscrowd"))),
        }
        for annotation in content["annotations"]
        if annotation["image_id"] in wanted and annotation["category_id"] in known and _is_box(annotation["bbox"])
    ]
    categories = [
        {"id": c.id, "name": c.name, "synonyms": list(c.synonyms), "frequency": c.frequency} for c in dataset.categories
    ]
    return {"images": images, "annotations": annotations, "categories": categories}


def _is_box(bbox: Any) -> bool:
    numbers = isinstance(bbox, list) and len(bbox) == 4 and all(isinstance(x, int | float) for x in bbox)
    return numbers and all(map(math.isfinite, bbox)) and bbox[2] > 0 and bbox[3] > 0
