#!/usr/bin/env bash
# Pillow 12 cannot read the uncompressed YCbCr TIFF that it writes.
#
# Expected: that a picture saved without compression can be opened again.
# Seen:     "image file is truncated (0 bytes not processed)" with Pillow 12.3.0, of a file that 13.0.0 reads, to the pixel.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/write.py" <<'PYTHON'
from PIL import Image

Image.linear_gradient("L").convert("RGB").convert("YCbCr").save("written.tif")
PYTHON
cat > "$folder/read.py" <<'PYTHON'
from PIL import Image

wanted = Image.linear_gradient("L").convert("RGB").convert("YCbCr")
try:
    with Image.open("written.tif") as picture:
        print("the same" if picture.tobytes() == wanted.tobytes() else "others")
except OSError as error:
    print(error)
PYTHON
cd "$folder"
found=()
for version in 12.3.0 13.0.0; do
    python3 -m venv "venv_$version" || exit 2
    "venv_$version/bin/pip" install -q "pillow==$version" || exit 2
    [ -e written.tif ] || "venv_$version/bin/python" write.py
    found+=("$("venv_$version/bin/python" read.py)")
done
echo "a YCbCr TIFF that Pillow 12.3.0 wrote, read by 12.3.0 and 13.0.0"
echo "expected the same the same"
echo "seen     ${found[*]}"
[ "${found[*]}" = "image file is truncated (0 bytes not processed) the same" ] || { echo "this has changed"; exit 1; }
