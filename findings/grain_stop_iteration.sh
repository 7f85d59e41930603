#!/usr/bin/env bash
# A StopIteration that a function under Grain's map() raises ends the data set, as if it had been read to its end.
#
# Expected: an error, as any other exception is. next() on an empty iterator raises it, for instance the search for an
#           image's first box where there is none.
# Seen:     the loop ends normally after the elements before it: two of six.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv" || exit 2
"$folder/venv/bin/pip" install -q grain==0.2.18 numpy==2.4.6 || exit 2
cd "$folder"
venv/bin/python - <<'PYTHON'
from importlib.metadata import version

import grain

boxes = [["a"], ["b"], [], ["c"], ["d"], ["e"]]


def first_box(boxes):
    return next(iter(boxes))


dataset = grain.MapDataset.source(boxes).map(first_box)
seen = {"MapDataset": list(dataset), "IterDataset": list(dataset.to_iter_dataset())}

print("grain", version("grain"))
print("expected an error at the third of six elements")
print("seen    ", seen)
if seen != {"MapDataset": ["a", "b"], "IterDataset": ["a", "b"]}:
    raise SystemExit("this has changed")
PYTHON
