#!/usr/bin/env bash
# pycocotools' AP is -1 where params.maxDets does not hold the number 100.
#
# Expected: AP is of the last of maxDets, as AP50, AP75 and all others are. 300 detections an image are what LVIS and
#           most detectors with queries report.
# Seen:     AP alone is looked up at 100 and is -1 (nothing to measure) beside an AP50 and an AP75 of 1. faster-coco-
#           eval, which replaces pycocotools, answers 1.
# Upstream: https://github.com/cocodataset/cocoapi/issues/558
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv" || exit 2
"$folder/venv/bin/pip" install -q pycocotools==2.0.11 faster-coco-eval==1.8.0 numpy==2.4.6 || exit 2
cd "$folder"
venv/bin/python - <<'PYTHON'
import contextlib
import io
from importlib.metadata import version

import faster_coco_eval
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

box = [10, 10, 30, 30]
truth = {
    "images": [{"id": 1, "width": 100, "height": 100}],
    "categories": [{"id": 1, "name": "cat"}],
    "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": box, "area": 900, "iscrowd": 0}],
}
detections = [{"image_id": 1, "category_id": 1, "bbox": box, "score": 0.9}]


def metrics(coco_type, evaluation_type):
    with contextlib.redirect_stdout(io.StringIO()):
        coco = coco_type()
        coco.dataset = truth
        coco.createIndex()
        evaluation = evaluation_type(coco, coco.loadRes(detections), "bbox")
        evaluation.params.maxDets = [1, 10, 300]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [round(float(number), 3) for number in evaluation.stats[:3]]


seen = metrics(COCO, COCOeval)
other = metrics(faster_coco_eval.COCO, faster_coco_eval.COCOeval_faster)
print("pycocotools", version("pycocotools"), "faster-coco-eval", version("faster-coco-eval"))
print("expected [1.0, 1.0, 1.0]: AP, AP50, AP75 of a perfect detector; faster-coco-eval has", other)
print("seen    ", seen)
if seen != [-1.0, 1.0, 1.0] or other != [1.0, 1.0, 1.0]:
    raise SystemExit("this has changed")
PYTHON
