#!/usr/bin/env bash
# globox counts annotations from 0, pycocotools takes the id 0 for "not found": a perfect detector loses an object.
#
# Expected: AP 1 before the conversion and after it. COCO's format gives each annotation an id and says nothing of 0.
# Seen:     AP 1.0 with the ids 1 and 2 of the first file, 0.2525 with the ids 0 and 1 of the file that globox wrote
#           from it.
# Upstream, of pycocotools: https://github.com/cocodataset/cocoapi/issues/664
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv" || exit 2
"$folder/venv/bin/pip" install -q globox==2.9.0 pycocotools==2.0.11 numpy==2.4.6 || exit 2
cd "$folder"
venv/bin/python - <<'PYTHON'
import contextlib
import io
import json
from importlib.metadata import version

from globox import AnnotationSet
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

boxes = [[10, 10, 30, 30], [50, 50, 30, 30]]
truth = {
    "images": [{"id": 1, "file_name": "a.jpg", "width": 100, "height": 100}],
    "categories": [{"id": 1, "name": "cat"}],
    "annotations": [
        {"id": i, "image_id": 1, "category_id": 1, "bbox": box, "area": 900, "iscrowd": 0}
        for i, box in enumerate(boxes, 1)
    ],
}
with open("before.json", "w") as file:
    json.dump(truth, file)
AnnotationSet.from_coco("before.json").save_coco("after.json", auto_ids=True)


def perfect_detector(path):
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(path)
        annotations = coco.loadAnns(coco.getAnnIds())
        found = [{key: a[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.9} for a in annotations]
        evaluation = COCOeval(coco, coco.loadRes(found), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [a["id"] for a in annotations], round(float(evaluation.stats[0]), 4)


seen = perfect_detector("before.json"), perfect_detector("after.json")
print("globox", version("globox"), "pycocotools", version("pycocotools"))
print("expected AP 1.0 twice: annotation ids and AP before and after")
print("seen    ", *seen)
if seen != (([1, 2], 1.0), ([0, 1], 0.2525)):
    raise SystemExit("this has changed")
PYTHON
