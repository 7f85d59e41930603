#!/usr/bin/env bash
# supervision numbers the classes of a data.yaml anew where their numbers have gaps: a box of class 2 gets another name.
#
# Expected: "names: {0: person, 2: car, 7: truck}" says that class 2 is a car; or an error, as from ultralytics 8.4.190,
#           which wants numbers without gaps.
# Seen:     the names become a list in the order of their numbers. Class 2 is its third, a truck; class 7 is an error.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv" || exit 2
"$folder/venv/bin/pip" install -q supervision==0.31.2 numpy==2.4.6 pillow==12.3.0 opencv-python-headless==5.0.0.93 || exit 2
cd "$folder"
venv/bin/python - <<'PYTHON'
from importlib.metadata import version
from pathlib import Path

import supervision
from PIL import Image

for name in ("images", "labels"):
    Path(name).mkdir()
Path("data.yaml").write_text("train: images\nval: images\nnames: {0: person, 2: car, 7: truck}\n")
Image.new("RGB", (100, 50)).save("images/a.png")
Path("labels/a.txt").write_text("2 0.5 0.5 0.2 0.4\n")

[(_, _, detections)] = supervision.DetectionDataset.from_yolo("images", "labels", "data.yaml")
seen = detections.data["class_name"].tolist()

print("supervision", version("supervision"))
print("expected ['car']: the name of class 2")
print("seen    ", seen)
if seen != ["truck"]:
    raise SystemExit("this has changed")
PYTHON
