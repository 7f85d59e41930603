#!/usr/bin/env bash
# tensorboardX multiplies float pictures by 255 and lets the result wrap around: what is too bright becomes dark, what
# is just below 0 becomes bright.
#
# Expected: values outside 0...1 are cut off at its ends. A picture that was resized with a bicubic filter, or
#           normalised by mean and deviation, has some.
# Seen:     1.5 is written as 126, -0.1 as 231, and 100.0 (a picture in 0...255 as float) as 156.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv" || exit 2
"$folder/venv/bin/pip" install -q tensorboardX==2.6.5 numpy==2.4.6 pillow==13.0.0 || exit 2
cd "$folder"
venv/bin/python - <<'PYTHON'
import io
from importlib.metadata import version

import numpy as np
from PIL import Image
from tensorboardX.summary import image


def written(value):
    """The grey of the picture in the event file, where every pixel was given as `value`."""
    summary = image("picture", np.full((3, 4, 4), value, np.float32))
    with Image.open(io.BytesIO(summary.value[0].image.encoded_image_string)) as picture:
        return picture.getpixel((0, 0))[0]


seen = {value: written(value) for value in (0.0, 1.0, 1.5, -0.1, 100.0)}
print("tensorboardX", version("tensorboardX"))
print("expected {0.0: 0, 1.0: 255, 1.5: 255, -0.1: 0, 100.0: 255}")
print("seen    ", seen)
if seen != {0.0: 0, 1.0: 255, 1.5: 126, -0.1: 231, 100.0: 156}:
    raise SystemExit("this has changed")
PYTHON
