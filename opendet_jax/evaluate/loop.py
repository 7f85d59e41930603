"""Evaluation of a model on a data set: detections, metrics and a few pictures in <workdir>/eval/<data set>/."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from opendet_jax.config import Config
from opendet_jax.data.images import read_image
from opendet_jax.data.pipeline import evaluation_batches
from opendet_jax.data.records import Dataset, Record
from opendet_jax.errors import InputError
from opendet_jax.evaluate.lvis import average_precisions, localisation_and_naming
from opendet_jax.evaluate.name_mapping import ExactMapping
from opendet_jax.evaluate.results import Result, results_of
from opendet_jax.evaluate.truth import lvis_truth
from opendet_jax.files import replacing, write_json
from opendet_jax.inference import Found, Inference, Selection
from opendet_jax.predict.draw import contact_sheet, draw, side_by_side

NMS_ABOVE = 300  # queries (method section 13)
PREDICTIONS, METRICS, PICTURES = "predictions.json", "metrics.json", "pictures.png"


def evaluate(inference: Inference, dataset: Dataset, config: Config, workdir: Path | str, step: int) -> dict[str, Any]:
    """Runs over the data set, prints a table and returns what metrics.json holds; `step` is that of the parameters.

    predictions.json has every detection kept, also those whose name is no class (category_id −1), with all names;
    pictures.png shows truth and prediction of the first `config.eval.pictures` images. A metric without a class to
    measure is None (null).

    Raises:
        InputError: the data set has no image.
        ImageError: an image cannot be read.
    """
    if not len(dataset):
        raise InputError(f"{dataset.annotations}: there is no image to evaluate on")
    folder = Path(workdir) / "eval" / config.data.name
    mapping = ExactMapping({"id": c.id, "name": c.name, "synonyms": c.synonyms} for c in dataset.categories)
    pictured = dataset.records[: config.eval.pictures]
    results: list[Result] = []
    shown: dict[int, Found] = {}
    for image_id, found in _detect(inference, dataset, config):
        results += results_of(image_id, found, mapping)
        if any(record.image_id == image_id for record in pictured):
            shown[image_id] = found
    truth = lvis_truth(dataset)
    metrics = {
        "name_mapping": mapping.title,
        "dataset": config.data.name,
        "step": step,
        "images": len(dataset),
        "detections": len(results),
        **average_precisions(truth, results),
        **localisation_and_naming(truth, results),
    }
    write_json(folder / PREDICTIONS, results, indent=None)
    if pictured:
        pairs = [_pair(record, shown[record.image_id], config.predict.min_score) for record in pictured]
        with replacing(folder / PICTURES) as part:
            contact_sheet(pairs, columns=2, width=2000).save(part, format="PNG")
    write_json(folder / METRICS, metrics)
    print(table(metrics), flush=True)
    return metrics


def _detect(inference: Inference, dataset: Dataset, config: Config) -> Iterator[tuple[int, Found]]:
    """(image id, what is found in it) of every image."""
    limits = config.eval
    selection = Selection(limits.max_detections, limits.min_score, limits.nms_iou, NMS_ABOVE)
    with tqdm(total=len(dataset), desc=f"evaluate {config.data.name}", unit="image") as progress:
        for batch in evaluation_batches(dataset, config.data, limits.batch_size):
            real = int(np.sum(np.asarray(batch.image_ids) >= 0))  # what fills the batch up comes last
            sizes = [(height, width) for height, width in np.asarray(batch.original_sizes)[:real].tolist()]
            found = inference(batch.images, sizes, selection)
            yield from zip(np.asarray(batch.image_ids)[:real].tolist(), found, strict=True)
            progress.update(real)


def _pair(record: Record, found: Found, min_score: float) -> Image.Image:
    """Truth and prediction; of the latter what prediction would show."""
    image = Image.fromarray(read_image(record.path))
    truth = draw(image, record.boxes, [names[0] for names in record.names])
    good = found.scores >= min_score
    best_names = [names[0] for names, is_good in zip(found.names, good, strict=True) if is_good]
    prediction = draw(image, found.boxes[good], best_names, found.scores[good])
    return side_by_side(truth, prediction, ("truth", f"prediction (score ≥ {min_score:g})"))


ROWS = (
    ("LVIS AP, ≤ 300 an image", ("AP", "AP50", "AP75", "APr", "APc", "APf", "APu", "APs", "APm", "APl")),
    ("fixed AP", ("fixed_AP", "fixed_APr", "fixed_APc", "fixed_APf")),
    ("whatever the name", ("agnostic_AP", "agnostic_AP50", "recall50")),
    ("names of boxes found", ("naming_accuracy",)),
)


def table(metrics: dict[str, Any]) -> str:
    """The metrics in percent, a line a group; – where there is nothing to measure."""
    lines = [
        f"{metrics['dataset']}, step {metrics['step']}: {metrics['images']} images, "
        f"names to classes: {metrics['name_mapping']}"
    ]
    for title, keys in ROWS:
        values = (metrics[key] for key in keys)
        cells = ("–" if value is None else f"{100 * value:.1f}" for value in values)
        lines.append(f"  {title:<24} " + "  ".join(f"{key} {cell}" for key, cell in zip(keys, cells, strict=True)))
    return "\n".join(lines)
