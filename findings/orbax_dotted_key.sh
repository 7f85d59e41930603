#!/usr/bin/env bash
# Orbax writes the key "a.b" and the key "b" within "a" to one place: one of two arrays is lost.
#
# Expected: both come back, or an error. Names of PyTorch's parameters have dots in them, so a tree that holds both
#           kinds is soon made.
# Seen:     saving and restoring succeed, and both keys have the same array.
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
import numpy as np
import orbax.checkpoint as ocp

tree = {"a.b": np.array([1.0]), "a": {"b": np.array([2.0])}}
with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(Path("tree").absolute(), tree)
    checkpointer.wait_until_finished()
    back = checkpointer.restore(Path("tree").absolute())
seen = back["a.b"].tolist(), back["a"]["b"].tolist()

print("orbax-checkpoint", ocp.__version__)
print('expected ([1.0], [2.0]): the arrays at "a.b" and at "b" within "a"')
print("seen    ", seen)
if seen[0] != seen[1]:
    raise SystemExit("this has changed")
PYTHON
