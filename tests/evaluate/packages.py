"""What the packages lvis and pycocotools themselves make of detections; also for benchmarks/evaluation.py."""

import contextlib
import io
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lvis.eval
import numpy as np
from lvis import LVIS, LVISEval, LVISResults
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

Results = Sequence[Mapping[str, Any]]
COCO_KEYS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


class _OldNumpy:
    """NumPy with the name `float` that it dropped and the package still uses."""

    float = float

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


class OldNumpyEval(LVISEval):
    """The package's evaluation, untouched: it only finds the name that it misses."""

    def accumulate(self) -> None:
        lvis.eval.np = _OldNumpy()
        try:
            super().accumulate()
        finally:
            lvis.eval.np = np


def run_lvis(annotations: Path, results: Results, max_dets: int = 300) -> dict[str, float | None]:
    """The package's AP and AR, the latter as "AR", "ARs" and so on; `max_dets` −1: no limit an image."""
    truth = LVIS(str(annotations))
    logger = logging.getLogger("lvis.results")
    logger.warn = logger.debug  # it warns of results that it does not check, by a deprecated method
    evaluation = OldNumpyEval(truth, LVISResults(truth, [dict(result) for result in results], max_dets), "bbox")
    evaluation.run()
    numbers = {key.split("@")[0]: value for key, value in evaluation.get_results().items()}
    return {key: None if value == -1 else float(value) for key, value in numbers.items()}


def run_fixed(annotations: Path, results: Results, limit: int = 10_000) -> dict[str, float | None]:
    """Fixed AP as it was published: the best detections of each class go into the package, which has no limit then."""
    by_class = defaultdict(list)
    for result in results:
        by_class[result["category_id"]].append(result)
    best = [r for own in by_class.values() for r in sorted(own, key=lambda r: r["score"], reverse=True)[:limit]]
    return run_lvis(annotations, best, max_dets=-1)


def run_coco(annotations: Path, results: Results, limit: int = 100) -> dict[str, float | None]:
    """pycocotools' twelve numbers, with at most `limit` detections of a class in an image."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
        evaluation = COCOeval(truth, truth.loadRes([dict(result) for result in results]), "bbox")
        evaluation.params.maxDets = [1, 10, limit]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    if limit != 100:  # pycocotools' first number is for 100 whatever the limits are
        precision = evaluation.eval["precision"][:, :, :, 0, -1]
        evaluation.stats[0] = precision[precision > -1].mean()
    keys = (key.replace("AR100", f"AR{limit}") for key in COCO_KEYS)
    return {key: None if value == -1 else float(value) for key, value in zip(keys, evaluation.stats, strict=True)}
