"""The images that went best and worst, truth beside prediction."""

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from opendet_jax.data.images import open_record
from opendet_jax.data.records import Dataset, Record
from opendet_jax.drawing import contact_sheet, draw, side_by_side
from opendet_jax.evaluate.detections import Detections
from opendet_jax.evaluate.evaluator import ImageScore

EXAMPLES = 6
WIDTH = 2000  # pixels of a sheet
NOTHING_FOUND = Detections(np.zeros(0, np.int64), np.zeros((0, 4)), np.zeros(0))


def best_and_worst(scores: Sequence[ImageScore]) -> tuple[list[ImageScore], list[ImageScore]]:
    """Up to EXAMPLES each, the most telling first; of equal ones those with more objects. No image is in both."""
    count = min(EXAMPLES, len(scores) // 2) or min(EXAMPLES, len(scores))
    best = sorted(scores, key=lambda score: (-score.share, -score.objects, score.image_id))[:count]
    rest = [score for score in scores if score not in best]
    return best, sorted(rest, key=lambda score: (score.share, -score.objects, score.image_id))[:count]


def sheet(
    dataset: Dataset, found: Mapping[int, Detections], scores: Sequence[ImageScore], class_names: Mapping[int, str]
) -> Image.Image:
    """Pairs of truth and prediction, of which as many boxes are drawn, the best, as the image has objects.

    `found` has an image's distinct boxes, nothing where there is none; `class_names` go by id. Raises ImageError.
    """
    records = {record.image_id: record for record in dataset.records}
    pairs = [_pair(records[score.image_id], found.get(score.image_id), score, class_names) for score in scores]
    return contact_sheet(pairs, columns=2, width=WIDTH)


def _pair(record: Record, found: Detections | None, score: ImageScore, class_names: Mapping[int, str]) -> Image.Image:
    image = open_record(record)
    truth = draw(image, record.boxes, [names[0] for names in record.names])
    best = found[found.best_first()[: score.objects]] if found is not None else NOTHING_FOUND
    names = best.names or [class_names.get(category_id, "?") for category_id in best.category_ids.tolist()]
    corners = np.concatenate([best.boxes[:, :2], best.boxes[:, :2] + best.boxes[:, 2:]], axis=1)
    prediction = draw(image, corners, names, best.scores)
    title = f"the {len(best)} best: {100 * score.share:.0f} % of {score.objects} right"
    return side_by_side(truth, prediction, (f"truth, image {record.image_id}", title))
