#!/usr/bin/env bash
# pycocotools overwrites the field "ignore" of the truth by "iscrowd", the LVIS API honours it: one file has two truths.
#
# Expected: an object with "ignore": 1 is neither wanted nor a mistake, in both: the one's evaluation was made from
#           the other's.
# Seen:     pycocotools wants it all the same. AP 0.505 by pycocotools and 1.0 by lvis, for the same boxes.
# Upstream: https://github.com/cocodataset/cocoapi/issues/466
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv" || exit 2
"$folder/venv/bin/pip" install -q pycocotools==2.0.11 numpy==2.4.6 matplotlib==3.11.2 \
    opencv-python-headless==5.0.0.93 || exit 2
"$folder/venv/bin/pip" install -q --no-deps lvis==0.5.3 || exit 2  # its own choice of OpenCV needs a display
cd "$folder"
venv/bin/python - <<'PYTHON'
import contextlib
import io
import json
import logging
from importlib.metadata import version

logging.disable(logging.WARNING)
import numpy as np

np.float = float  # NumPy has lacked this name since 1.24; lvis 0.5.3 still uses it
from lvis import LVIS, LVISEval, LVISResults
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

found, ignored = [10, 10, 30, 30], [50, 50, 30, 30]
truth = {
    "images": [{"id": 1, "width": 100, "height": 100, "neg_category_ids": [], "not_exhaustive_category_ids": []}],
    "categories": [{"id": 1, "name": "cat", "frequency": "f"}],
    "annotations": [
        {"id": i, "image_id": 1, "category_id": 1, "bbox": box, "area": 900, "iscrowd": 0, "ignore": ignore}
        for i, box, ignore in ((1, found, 0), (2, ignored, 1))
    ],
}
with open("truth.json", "w") as file:
    json.dump(truth, file)
detections = [{"image_id": 1, "category_id": 1, "bbox": found, "score": 0.9}]

with contextlib.redirect_stdout(io.StringIO()):
    coco = COCO("truth.json")
    coco_evaluation = COCOeval(coco, coco.loadRes(detections), "bbox")
    coco_evaluation.evaluate()
    coco_evaluation.accumulate()
    coco_evaluation.summarize()
lvis = LVIS("truth.json")
lvis_evaluation = LVISEval(lvis, LVISResults(lvis, detections), "bbox")
lvis_evaluation.run()
seen = round(float(coco_evaluation.stats[0]), 4), round(float(lvis_evaluation.results["AP"]), 4)

print("pycocotools", version("pycocotools"), "lvis", version("lvis"))
print("expected (1.0, 1.0): AP by pycocotools, AP by lvis")
print("seen    ", seen)
if seen != (0.505, 1.0):
    raise SystemExit("this has changed")
PYTHON
