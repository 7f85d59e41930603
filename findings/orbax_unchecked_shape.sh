#!/usr/bin/env bash
# Orbax checks the shape that a checkpoint is restored to where a JAX array was saved, and not where a NumPy array was.
#
# Expected: ValueError for a target of another shape ("strict" is the default), whatever kind of array was saved: a
#           ShapeDtypeStruct says what is wanted.
# Seen:     what was saved from a JAX array is refused. What was saved from a NumPy array comes back in its own shape,
#           and with a NumPy array as target both do. A ShapeDtypeStruct with a sharding is checked in all cases.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv" || exit 2
"$folder/venv/bin/pip" install -q orbax-checkpoint==0.12.8 \
    tensorstore==0.1.86 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 || exit 2
cd "$folder"
venv/bin/python - <<'PYTHON'
import logging
from pathlib import Path

logging.disable(logging.WARNING)
import jax
import numpy as np
import orbax.checkpoint as ocp

numbers = np.arange(8, dtype=np.float32)
target = {"weight": jax.ShapeDtypeStruct((4,), np.float32)}
seen = {}
with ocp.StandardCheckpointer() as checkpointer:
    for name, array in (("saved from JAX", jax.numpy.asarray(numbers)), ("saved from NumPy", numbers)):
        folder = Path(name).absolute()
        checkpointer.save(folder, {"weight": array})
        checkpointer.wait_until_finished()
        try:
            seen[name] = checkpointer.restore(folder, target)["weight"].shape
        except ValueError:
            seen[name] = "ValueError"

print("orbax-checkpoint", ocp.__version__)
print("expected ValueError twice: an array of shape (8,) is restored to shape (4,)")
print("seen    ", seen)
if seen != {"saved from JAX": "ValueError", "saved from NumPy": (8,)}:
    raise SystemExit("this has changed")
PYTHON
