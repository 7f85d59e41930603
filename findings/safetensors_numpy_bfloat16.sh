#!/usr/bin/env bash
# safetensors.numpy writes bfloat16 and cannot read what it has written.
#
# Expected: load(save(x)) is x, as for every other number format of the file; load and load_file read the same files.
# Seen:     load raises KeyError: 'BF16', whatever has been imported. load_file raises TypeError in a program that has
#           not imported ml_dtypes, and works in one that has: whether a file can be read depends on an import
#           elsewhere.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv" || exit 2
"$folder/venv/bin/pip" install -q safetensors==0.8.0 numpy==2.4.6 ml_dtypes==0.6.0 || exit 2
cd "$folder"
venv/bin/python - <<'PYTHON'
import subprocess
import sys

import ml_dtypes
import numpy as np
import safetensors
from safetensors.numpy import load, save, save_file

array = np.array([1, 2], ml_dtypes.bfloat16)
save_file({"x": array}, "weights.safetensors")
READ = 'from safetensors.numpy import load_file; load_file("weights.safetensors")'


def load_bytes():
    try:
        load(save({"x": array}))
    except KeyError as error:
        return repr(error)
    return "read"


def in_a_new_program(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return done.stderr.splitlines()[-1] if done.returncode else "read"


seen = {
    "load": load_bytes(),
    "load_file": in_a_new_program(READ),
    "load_file after import ml_dtypes": in_a_new_program("import ml_dtypes; " + READ),
}
print("safetensors", safetensors.__version__, "numpy", np.__version__)
print("expected 'read' three times")
for name, answer in seen.items():
    print("seen    ", name, "->", answer)
if seen != {
    "load": "KeyError('BF16')",
    "load_file": "TypeError: data type 'bfloat16' not understood",
    "load_file after import ml_dtypes": "read",
}:
    raise SystemExit("this has changed")
PYTHON
