"""`python -m opendet_jax.evaluate`: a results file scored, as a few lines of text, tables and pictures."""

import csv
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from opendet_jax.data.formats.records import Dataset
from opendet_jax.evaluate.evaluator import EdgeEvaluator, Evaluation, Protocol, edges_said
from opendet_jax.evaluate.greedy_matching import AREAS
from opendet_jax.evaluate.name_mapping import shared_names, shared_said
from opendet_jax.evaluate.pictures import best_and_worst, draw_ap_by_frequency, draw_names, draw_precision_recall, sheet
from opendet_jax.evaluate.results import Results, ResultsError, read_results
from opendet_jax.evaluate.truth import Content, read_truth
from opendet_jax.files import replacing, try_folder, write_json

_SIZES = ("APs", "APm", "APl")
_LVIS = ("AP", "AP50", "AP75", "APr", "APc", "APf", "APu", *_SIZES)
_COCO = ("AP", "AP50", "AP75", *_SIZES, "AR1", "AR10", "AR100")
_COCO_TITLE = "COCO AP, ≤ 100 a class"
METRICS = "metrics.json"
EXAMPLES = ("best_images.png", "worst_images.png")
TITLES = {"lvis": "LVIS AP, ≤ 300 detections an image", "lvis_fixed": "fixed AP", "coco": "COCO AP"}


def score_file(
    annotations: Path,
    predictions: Path,
    protocol: Protocol,
    out: Path,
    images: Path | None = None,
    minival: bool = False,
    clip_truth: bool = False,
    only_predicted: bool = False,
) -> dict[str, Any]:
    """Writes metrics.json, tables and pictures to `out` and returns the metrics; best and worst images need `images`.

    `clip_truth`: true boxes are clipped to their pictures (`EdgeEvaluator`). `only_predicted`: images without a
    detection are left out; otherwise they are counted and said, and their objects are missed. Numbers are written
    first, so that Ctrl-C while pictures are drawn costs none of them.

    Raises:
        AnnotationError: the annotations, or one of them, cannot be used; the predictions are not json.
        ResultsError: a prediction cannot be scored, or `out` not be written to, which is found out first.
        ImageError: an image to be drawn cannot be read.
    """
    try:
        try_folder(out)
    except OSError as error:
        raise ResultsError(f"{out}: cannot be written to: {error.strerror}") from error
    dataset, truth, problems = read_truth(annotations, images, minival)
    category_ids = {category.id for category in dataset.categories}
    results = read_results(predictions, {record.image_id for record in dataset.records}, category_ids)
    if problems.counts:
        _warn(f"{annotations}: {problems}")
    if shared := shared_names(truth["categories"]):
        _warn(f"{annotations}: {shared_said(shared)}; a detection counts for the class of its category_id")
    if not len(results):
        _warn(f"{predictions} holds no detection: every score is 0")
    dataset, truth, missing = _of_predicted(dataset, truth, results, predictions, only_predicted)
    evaluator = EdgeEvaluator(truth, dataset, protocol, clip_truth)
    for image_id, detections, numbers in tqdm(results.by_image(), desc="evaluate", unit="image", total=results.images):
        evaluator.add(image_id, detections, numbers=numbers)
    evaluation, edges = evaluator.finish()
    metrics: dict[str, Any] = {
        "protocol": protocol,
        "annotations": str(annotations),
        "predictions": str(predictions),
        "images": len(dataset),
        **missing,
        "detections": len(results),
        **evaluation.metrics,
        **edges,
    }
    sheets = _example_sheets(dataset, results, evaluation) if images is not None else {}
    write_classes(evaluation, out / "classes.csv")
    write_names(evaluation, out / "names.csv")
    write_json(out / METRICS, metrics)
    left_out = f" ({missing['images_left_out']} without a detection left out)" if "images_left_out" in missing else ""
    print(f"{len(dataset)} images{left_out}, {len(results)} detections\n{summary(metrics, protocol)}\nwritten to {out}")
    _draw(evaluation, protocol, f"{predictions.name} on {annotations.name}: {TITLES[protocol]}", out)
    for name in EXAMPLES:
        if name not in sheets:
            (out / name).unlink(missing_ok=True)  # of an evaluation before this one
            continue
        with replacing(out / name) as part:
            sheets[name].save(part, format="PNG")
    return metrics


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


def _of_predicted(
    dataset: Dataset, truth: Content, results: Results, predictions: Path, only: bool
) -> tuple[Dataset, Content, dict[str, int]]:
    """With `only` the truth of the images that have a detection; and what metrics.json has of the others.

    Raises ResultsError where no image is left.
    """
    predicted = set(results.image_ids.tolist())
    missing = len(dataset) - len(predicted)
    if not missing:
        return dataset, truth, {}
    if not only:
        if predicted:
            objects = sum(a["image_id"] not in predicted and not a["ignore"] for a in truth["annotations"])
            _warn(
                f"{missing} of {len(dataset)} images have no detection in {predictions}: their {objects} objects are "
                "missed (--only_predicted leaves such images out)"
            )
        return dataset, truth, {"images_without_detection": missing}
    if not predicted:
        raise ResultsError(f"{predictions}: holds no detection, and --only_predicted leaves no image")
    records = tuple(record for record in dataset.records if record.image_id in predicted)
    truth = {
        "images": [image for image in truth["images"] if image["id"] in predicted],
        "annotations": [annotation for annotation in truth["annotations"] if annotation["image_id"] in predicted],
        "categories": truth["categories"],
    }
    return replace(dataset, records=records), truth, {"images_left_out": missing}


def _draw(evaluation: Evaluation, protocol: Protocol, title: str, out: Path) -> None:
    curves = evaluation.curves["fixed_" if protocol == "lvis_fixed" else ""]
    draw_precision_recall(evaluation.truth, curves, title, out / "precision_recall.png")
    draw_ap_by_frequency(evaluation.truth, curves, title, out / "ap_by_frequency.png")
    draw_names(evaluation, out / "names.png")


def _example_sheets(dataset: Dataset, results: Results, evaluation: Evaluation) -> dict[str, Image.Image]:
    class_names = {category.id: category.name for category in dataset.categories}
    sheets = {}
    for name, scores in zip(EXAMPLES, best_and_worst(evaluation.images), strict=True):
        found = results.by_image({score.image_id for score in scores})
        boxes = {image_id: detections.distinct_boxes() for image_id, detections, _ in found}
        if scores:
            sheets[name] = sheet(dataset, boxes, scores, class_names)
    return sheets


def summary(metrics: Mapping[str, Any], protocol: Protocol = "lvis") -> str:
    """The metrics in percent, a line a group, the protocol's own first; – where there is nothing to measure."""
    rows: list[tuple[str, tuple[str, ...]]]
    if protocol == "coco":
        rows = [(_COCO_TITLE, _COCO)]
    else:
        rows = [("LVIS AP, ≤ 300 an image", _LVIS), ("fixed AP", tuple(f"fixed_{key}" for key in _LVIS))]
        rows = rows if protocol == "lvis" else rows[::-1]
    if "coco_AP" in metrics:
        rows.append((_COCO_TITLE, tuple(f"coco_{key}" for key in _COCO)))
    rows += [
        ("whatever the name", ("agnostic_AP", "agnostic_AP50", "agnostic_AR", "recall50")),
        ("names of boxes found", ("naming_accuracy", "exact_name_accuracy", "synonym_accuracy")),
    ]
    lines = [_line(title, {key: metrics[key] for key in keys}) for title, keys in rows]
    return "\n".join([*lines, *edges_said(metrics)])


def _line(title: str, values: Mapping[str, float | None]) -> str:
    cells = (f"{key} {'–' if value is None else f'{100 * value:.1f}'}" for key, value in values.items())
    return f"  {title:<24} " + "  ".join(cells)


def write_classes(evaluation: Evaluation, path: Path) -> None:
    """A line a class. A cell without a number is empty: the class has no object to be found.

    objects: to be found. detections: those that count. found: objects found at IoU 0.5 whatever they are called; named:
    those of them that were given the class. AP, AP50 and AR, and with a prefix those of other protocols.
    """
    truth, localisation = evaluation.truth, evaluation.localisation
    prefixes = list(evaluation.curves)
    header = ["id", "name", "frequency", "objects", "detections", "found", "named"]
    header += [prefix + key for prefix in prefixes for key in ("AP", "AP50", "AR")]
    lines = []
    for place, category in enumerate(truth.categories):
        line = [category["id"], category["name"], truth.groups[place], truth.wanted[place, list(AREAS).index("all")]]
        line += [evaluation.counted[place], localisation.found[place], localisation.of_its_class[place]]
        for prefix in prefixes:
            curves, own = evaluation.curves[prefix], np.array([place])
            line += [curves.ap(own), curves.ap(own, iou=0.5), curves.ar(own)]
        lines.append(line)
    _write(path, header, lines)


def write_names(evaluation: Evaluation, path: Path) -> None:
    """What objects found at IoU 0.5 were called: class, name given, times; most frequent first."""
    names = [category["name"] for category in evaluation.truth.categories]
    called = sorted(evaluation.localisation.called.items(), key=lambda item: (-item[1], item[0]))
    _write(path, ["class", "called", "times"], ([names[true], name, times] for (true, name), times in called))


def _write(path: Path, header: Sequence[str], lines: Iterable[Sequence[Any]]) -> None:
    with replacing(path) as part, part.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(lines)
