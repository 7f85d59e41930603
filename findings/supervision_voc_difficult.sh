#!/usr/bin/env bash
# supervision reads Pascal VOC without "difficult", and writes it without: hard objects become ordinary ones.
#
# Expected: "difficult" of each object in the data of its detection, as VOC's evaluation neither looks for such objects
#           nor counts them as mistakes; or they are left out. Both can be told from the result.
# Seen:     two objects that cannot be told apart; nothing is said. The xml that is written back has no "difficult".
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

OBJECT = (
    "<object><name>cat</name><pose>Left</pose><truncated>0</truncated><difficult>{}</difficult>"
    "<bndbox><xmin>{}</xmin><ymin>1</ymin><xmax>{}</xmax><ymax>20</ymax></bndbox></object>"
)
for name in ("JPEGImages", "Annotations"):
    Path(name).mkdir()
Image.new("RGB", (100, 50)).save("JPEGImages/a.jpg")
Path("Annotations/a.xml").write_text(
    "<annotation><filename>a.jpg</filename><size><width>100</width><height>50</height><depth>3</depth></size>"
    + OBJECT.format(0, 1, 20)
    + OBJECT.format(1, 41, 60)
    + "</annotation>"
)

dataset = supervision.DetectionDataset.from_pascal_voc("JPEGImages", "Annotations")
[(_, _, detections)] = dataset
dataset.as_pascal_voc(annotations_directory_path="written")
written = Path("written/a.xml").read_text()
seen = len(detections), sorted(detections.data), detections.metadata, "difficult" in written

print("supervision", version("supervision"))
print("expected (2, ['class_name', 'difficult'], {}, True) or (1, ['class_name'], {}, False): objects, what is known of")
print("         them, what is known of the image, whether \"difficult\" is written back")
print("seen    ", seen)
if seen != (2, ["class_name"], {}, False):
    raise SystemExit("this has changed")
PYTHON
