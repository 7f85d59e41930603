#!/usr/bin/env bash
# gradio's picture component, asked for a file path, hands over another picture than the one that was uploaded.
#
# Expected: that gr.Image(type="filepath") gives the path of the uploaded file, as gr.File does.
# Seen:     it opens the file, converts it to RGB and writes a new one. Of a 16-bit PNG (depth, X-ray, microscopy) with the grey
#           values 0 … 2,999 all above 255 come back as white, without a word.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv" || exit 2
"$folder/venv/bin/pip" install -q gradio==6.31.0 numpy==2.4.6 pillow==12.3.0 || exit 2
cat > "$folder/upload.py" <<'PYTHON'
import os

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
import gradio
import numpy as np
from gradio.data_classes import FileData, ImageData
from PIL import Image

values = np.arange(3000, dtype=np.uint16).reshape(50, 60)
Image.fromarray(values).save("depth.png")


def grey_values(path):
    with Image.open(path) as picture:
        values = np.asarray(picture)
        return len(np.unique(values)), int(values.max())


picture = gradio.Image(type="filepath").preprocess(ImageData(path="depth.png", orig_name="depth.png"))
file = gradio.File().preprocess(FileData(path="depth.png", orig_name="depth.png"))
print({"uploaded": grey_values("depth.png"), "Image": grey_values(picture), "File": grey_values(file)})
PYTHON
cd "$folder"
found=$(venv/bin/python upload.py)
echo "gradio 6.31.0, pillow 12.3.0; number of grey values and the largest of a 16-bit PNG"
echo "expected (3000, 2999) three times"
echo "seen     $found"
[ "$found" = "{'uploaded': (3000, 2999), 'Image': (256, 255), 'File': (3000, 2999)}" ] || { echo "this has changed"; exit 1; }
