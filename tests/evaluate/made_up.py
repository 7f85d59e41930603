"""Truths and detections made up for the tests of the evaluation, and our numbers on them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from opendet_jax.evaluate.evaluator import Evaluation, Evaluator, Protocol
from opendet_jax.evaluate.results import ScoredBoxes


def as_detections(results: Sequence[Mapping[str, Any]]) -> ScoredBoxes:
    return ScoredBoxes(
        np.array([result["category_id"] for result in results], np.int64),
        np.array([result["bbox"] for result in results], np.float64).reshape(-1, 4),
        np.array([result["score"] for result in results], np.float64),
        [result["names"][0] for result in results] if results and "names" in results[0] else None,
    )


def evaluate(truth: dict, results: Sequence[Mapping[str, Any]], protocol: Protocol = "lvis") -> Evaluation:
    """All results, image by image in an order that is not that of the truth."""
    evaluator = Evaluator(truth, protocol)
    for image_id in sorted({result["image_id"] for result in results}, key=lambda image_id: str(image_id)[::-1]):
        rows = [row for row, result in enumerate(results) if result["image_id"] == image_id]
        evaluator.add(image_id, as_detections([results[row] for row in rows]), numbers=np.array(rows))
    return evaluator.finish()


def metrics(truth: dict, results: Sequence[Mapping[str, Any]], protocol: Protocol = "lvis") -> dict[str, float | None]:
    return evaluate(truth, results, protocol).metrics


def detections_like(truth, rng, wrong_class=0.0, shift=0.0, extra=0):
    """The true boxes moved by up to `shift` of their size, some of another class, and `extra` random ones an image."""
    classes = [category["id"] for category in truth["categories"]]
    found = []
    for annotation in truth["annotations"]:
        x, y, w, h = annotation["bbox"]
        dx, dy, dw, dh = rng.uniform(-shift, shift, 4)
        category = int(rng.choice(classes)) if rng.uniform() < wrong_class else annotation["category_id"]
        bbox = [x + dx * w, y + dy * h, w * (1 + dw), h * (1 + dh)]
        found.append({"image_id": annotation["image_id"], "category_id": category, "bbox": bbox})
    for image in truth["images"]:
        present = [a["category_id"] for a in truth["annotations"] if a["image_id"] == image["id"]]
        likely = present + image.get("neg_category_ids", classes) + image.get("not_exhaustive_category_ids", [])
        for _ in range(extra if likely else 0):
            w, h = rng.uniform(5, image["width"]), rng.uniform(5, image["height"])
            x, y = rng.uniform(0, image["width"] - w), rng.uniform(0, image["height"] - h)
            bbox = [x, y, w, h]
            found.append({"image_id": image["id"], "category_id": int(rng.choice(likely)), "bbox": bbox})
    for detection in found:
        detection["bbox"] = [float(number) for number in detection["bbox"]]
        detection["score"] = float(rng.choice(np.linspace(0, 1, 200)))  # with ties
    return found


def random_truth(rng, images=12, classes=5, objects=9, crowds=0.0, federated=False):
    """Objects of all sizes, drawn close together so that detections have a choice; a share of them crowds."""
    names = [{"id": 3 * c + 2, "name": f"class {c}", "frequency": "rcf"[c % 3]} for c in range(classes)]
    ids = [category["id"] for category in names]
    entries, annotations = [], []
    for i in rng.permutation(images).tolist():
        entry = {"id": 7 * i + 1, "file_name": f"{i}.jpg", "width": 640, "height": 480}
        if federated:
            entry["neg_category_ids"] = rng.choice(ids, 2, replace=False).tolist()
            entry["not_exhaustive_category_ids"] = rng.choice(ids, 1).tolist()
        entries.append(entry)
        for _ in range(rng.integers(0, objects)):
            w, h = np.exp(rng.uniform(np.log(8), np.log(300), 2))
            x, y = rng.uniform(0, 640 - w), rng.uniform(0, 480 - h)
            bbox = [float(number) for number in (x, y, w, h)]
            annotation = {"image_id": entry["id"], "category_id": int(rng.choice(ids)), "bbox": bbox}
            annotation |= {"area": float(w * h * rng.uniform(0.5, 1)), "iscrowd": int(rng.uniform() < crowds)}
            annotations.append(annotation)
            if rng.uniform() < 0.3:  # a twin, a little beside it
                annotations.append({**annotation, "bbox": [float(x + 0.1 * w), *bbox[1:]]})
    for number, annotation in enumerate(annotations, 1):
        annotation["id"] = number
    return {"images": entries, "annotations": annotations, "categories": names}


def small_truth():
    """Two images, four classes (r, c, f, u), a box of each."""
    categories = [{"id": i, "name": f"n{i}", "frequency": group} for i, group in enumerate("rcfu", 1)]
    images = [
        {"id": i, "width": 100, "height": 100, "neg_category_ids": [1, 2, 3, 4], "not_exhaustive_category_ids": []}
        for i in (7, 9)
    ]
    boxes = {1: [0, 0, 10, 10], 2: [20, 20, 40, 40], 3: [60, 60, 30, 30], 4: [0, 50, 20, 20]}
    annotations = [
        {"id": i, "image_id": 7 if i < 3 else 9, "category_id": i, "bbox": box, "area": box[2] * box[3]}
        for i, box in boxes.items()
    ]
    return {"images": images, "annotations": annotations, "categories": categories}


def exact_detections(truth):
    return [
        {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"], "score": 0.5}
        for a in truth["annotations"]
    ]
