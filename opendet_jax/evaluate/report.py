"""`python -m opendet_jax.evaluate`: a results file scored, and what there is to see of it."""

import sys
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from opendet_jax.data.records import Dataset
from opendet_jax.evaluate.charts import draw_ap_by_frequency, draw_names, draw_precision_recall
from opendet_jax.evaluate.evaluator import Evaluation, Evaluator, Protocol
from opendet_jax.evaluate.examples import best_and_worst, sheet
from opendet_jax.evaluate.results_file import Results, read_results
from opendet_jax.evaluate.summary import summary
from opendet_jax.evaluate.tables import write_classes, write_names
from opendet_jax.evaluate.truth import read_truth
from opendet_jax.files import replacing, write_json

TITLES = {"lvis": "LVIS AP, ≤ 300 detections an image", "lvis_fixed": "fixed AP", "coco": "COCO AP"}


def score_file(
    annotations: Path,
    predictions: Path,
    protocol: Protocol,
    out: Path,
    images: Path | None = None,
    minival: bool = False,
) -> dict[str, Any]:
    """Writes metrics.json, tables and pictures to `out` and returns the metrics; best and worst images need `images`.

    Raises:
        AnnotationError: the annotations, or one of them, cannot be used; the predictions are not json.
        ResultsError: a prediction cannot be scored.
        ImageError: an image to be drawn cannot be read.
    """
    dataset, truth = read_truth(annotations, images or annotations.parent, minival)
    category_ids = {category.id for category in dataset.categories}
    results = read_results(predictions, {record.image_id for record in dataset.records}, category_ids)
    if not len(results):
        print(f"warning: {predictions} holds no detection: every score is 0", file=sys.stderr)
    evaluator = Evaluator(truth, protocol)
    for image_id, detections, numbers in tqdm(results.by_image(), desc="evaluate", unit="image", total=results.images):
        evaluator.add(image_id, detections, numbers=numbers)
    evaluation = evaluator.finish()
    metrics: dict[str, Any] = {
        "protocol": protocol,
        "annotations": str(annotations),
        "predictions": str(predictions),
        "images": len(dataset),
        "detections": len(results),
        **evaluation.metrics,
    }
    sheets = _example_sheets(dataset, results, evaluation) if images is not None else {}
    for name, picture in sheets.items():
        with replacing(out / name) as part:
            picture.save(part, format="PNG")
    _draw(evaluation, protocol, f"{predictions.name} on {annotations.name}: {TITLES[protocol]}", out)
    write_classes(evaluation, out / "classes.csv")
    write_names(evaluation, out / "names.csv")
    write_json(out / "metrics.json", metrics)
    print(f"{len(dataset)} images, {len(results)} detections\n{summary(metrics, protocol)}\nwritten to {out}")
    return metrics


def _draw(evaluation: Evaluation, protocol: Protocol, title: str, out: Path) -> None:
    curves = evaluation.curves["fixed_" if protocol == "lvis_fixed" else ""]
    draw_precision_recall(evaluation.truth, curves, title, out / "precision_recall.png")
    draw_ap_by_frequency(evaluation.truth, curves, title, out / "ap_by_frequency.png")
    draw_names(evaluation, out / "names.png")


def _example_sheets(dataset: Dataset, results: Results, evaluation: Evaluation) -> dict[str, Image.Image]:
    class_names = {category.id: category.name for category in dataset.categories}
    sheets = {}
    for name, scores in zip(("best", "worst"), best_and_worst(evaluation.images), strict=True):
        found = results.by_image({score.image_id for score in scores})
        boxes = {image_id: detections.distinct_boxes() for image_id, detections, _ in found}
        if scores:
            sheets[f"{name}_images.png"] = sheet(dataset, boxes, scores, class_names)
    return sheets
