#!/usr/bin/env bash
# A tracker gives Detections without data for a frame in which nothing is found.
#
# Expected: that the fields of `data` stay, with no rows, as they do where supervision cuts all rows away: a loop over
#           frames can then read found["class_name"] in each.
# Seen:     they are gone, and found["class_name"] is None: TypeError at the first frame without an object.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv" || exit 2
"$folder/venv/bin/pip" install -q trackers==2.6.1 supervision==0.31.2 numpy==2.4.6 || exit 2
cat > "$folder/track.py" <<'PYTHON'
import numpy as np
import supervision as sv
from trackers import ByteTrackTracker

cat = sv.Detections(
    xyxy=np.array([[0.0, 0.0, 10.0, 10.0]]), confidence=np.array([0.9]), data={"class_name": np.array(["cat"])}
)
nothing = cat[cat.confidence > 1]
tracker = ByteTrackTracker()
frames = {"cut": nothing, "tracked, before": tracker.update(nothing)}
for _ in range(3):
    frames["tracked, a cat"] = tracker.update(cat)
frames["tracked, after"] = tracker.update(nothing)
print({name: None if found["class_name"] is None else found["class_name"].tolist() for name, found in frames.items()})
PYTHON
cd "$folder"
found=$(venv/bin/python track.py)
echo "trackers 2.6.1, supervision 0.31.2; the names of a frame"
echo "expected [] of every frame without a cat"
echo "seen     $found"
[ "$found" = "{'cut': [], 'tracked, before': None, 'tracked, a cat': ['cat'], 'tracked, after': None}" ] || { echo "this has changed"; exit 1; }
