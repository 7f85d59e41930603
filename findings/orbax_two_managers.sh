#!/usr/bin/env bash
# Two Orbax CheckpointManagers on one folder replace each other's finished steps, and both are told that they have
# saved.
#
# Expected: the second save of a step that is already there is refused (StepAlreadyExistsError or False), as it is
#           within one manager. The same training started twice is enough to get here.
# Seen:     save() answers True to both. What is left is the second's; nothing says that the first's is gone.
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

options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
first, second = (ocp.CheckpointManager(Path("run").absolute(), options=options) for _ in range(2))


def save(manager, number):
    return manager.save(1, args=ocp.args.StandardSave({"weight": np.full(2, number, np.float32)}))


answers = [save(first, 1.0), save(second, 2.0), save(first, 3.0)]
left = first.restore(1, args=ocp.args.StandardRestore())["weight"].tolist()

print("orbax-checkpoint", ocp.__version__)
print("expected [True, False, False] and [1.0, 1.0]: answers to the first, the second, the first again; what is left")
print("seen    ", answers, "and", left)
if (answers, left) != ([True, True, False], [2.0, 2.0]):
    raise SystemExit("this has changed")
PYTHON
