#!/usr/bin/env bash
# Orbax takes a checkpoint whose metric is NaN for the best, and deletes the best one for it.
#
# Expected: NaN is never better than a number: of the metrics 0.9 and NaN, kept is the step of 0.9.
# Seen:     best_step() is the step of NaN, and the step of 0.9 is deleted.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv" || exit 2
"$folder/venv/bin/pip" install -q orbax-checkpoint==0.12.8 \
    tensorstore==0.1.86 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 || exit 2
cd "$folder"
venv/bin/python - <<'PYTHON'
import logging
import math
from pathlib import Path

logging.disable(logging.WARNING)
import numpy as np
import orbax.checkpoint as ocp

options = ocp.CheckpointManagerOptions(
    max_to_keep=1, best_fn=lambda metrics: metrics["AP"], best_mode="max", enable_async_checkpointing=False
)
manager = ocp.CheckpointManager(Path("run").absolute(), options=options)
for step, metric in enumerate((0.9, math.nan)):
    manager.save(step, args=ocp.args.StandardSave({"weight": np.ones(2)}), metrics={"AP": metric})
seen = list(manager.all_steps()), manager.best_step()

print("orbax-checkpoint", ocp.__version__)
print("expected ([0], 0): the steps that are left, the best of them")
print("seen    ", seen)
if seen != ([1], 1):
    raise SystemExit("this has changed")
PYTHON
