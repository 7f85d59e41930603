#!/usr/bin/env bash
# jax.device_put(x, may_alias=False) shares memory with the NumPy array that it was asked to copy.
#
# Expected: its documentation says that x is copied. A JAX array does not change, so writing into the NumPy array
#           afterwards does nothing to it.
# Seen:     on a CPU the copy is left out wherever NumPy's memory begins at a multiple of 64 bytes, and the JAX array
#           follows what is written. Where it begins is chance: one program may be right in one run and wrong in the
#           next.
# Upstream: https://github.com/jax-ml/jax/issues/37830
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv" || exit 2
"$folder/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 || exit 2
cd "$folder"
venv/bin/python - <<'PYTHON'
import jax
import numpy as np


def array_at(offset):
    """1,000 ones in memory that begins `offset` bytes after a multiple of 64."""
    memory = np.zeros(4000 + 128, np.uint8)
    start = -memory.ctypes.data % 64 + offset
    array = memory[start : start + 4000].view(np.float32)
    array[:] = 1
    return array


seen = {}
for offset in (0, 4):
    source = array_at(offset)
    copy = jax.block_until_ready(jax.device_put(source, may_alias=False))
    source[:] = 5
    seen[offset] = float(copy[0])

print("jax", jax.__version__)
print("expected {0: 1.0, 4: 1.0}: first number of the copy, by the offset of the memory")
print("seen    ", seen)
if seen != {0: 5.0, 4: 1.0}:
    raise SystemExit("this has changed")
PYTHON
