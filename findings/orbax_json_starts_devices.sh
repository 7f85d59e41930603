#!/usr/bin/env bash
# Reading a JSON item of an Orbax checkpoint starts JAX's devices, after which processes can no longer be joined.
#
# Expected: a program may look at what a checkpoint says of its config, which is a json file of a kilobyte, and then, knowing
#           how many processes there are, call jax.distributed.initialize.
# Seen:     a CheckpointManager starts JAX's back end when it is made, without a word. jax.distributed.initialize then
#           raises RuntimeError. Read as a file (<step>/config/metadata) the same json starts nothing.
# Upstream: none that we know of.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv" || exit 2
"$folder/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 orbax-checkpoint==0.12.8 numpy==2.4.6 || exit 2
cd "$folder"
cat > program.py <<'PYTHON'
import json
import socket
import sys
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from jax._src import xla_bridge

how, folder = sys.argv[1], Path("checkpoints").absolute()
if how == "write":
    with ocp.CheckpointManager(folder) as manager:
        manager.save(1, args=ocp.args.Composite(config=ocp.args.JsonSave({"processes": 1})))
    sys.exit()
if how == "manager":
    with ocp.CheckpointManager(folder) as manager:
        config = manager.restore(1, args=ocp.args.Composite(config=ocp.args.JsonRestore()))["config"]
else:
    config = json.loads((folder / "1/config/metadata").read_text())
started = xla_bridge.backends_are_initialized()
with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
try:
    jax.distributed.initialize(f"localhost:{port}", config["processes"], 0)
    print(f"started {started}, joined")
except RuntimeError as error:
    print(f"started {started}, {str(error).splitlines()[0][:60]}")
PYTHON
venv/bin/python program.py write 2> /dev/null
by_manager=$(venv/bin/python program.py manager 2> /dev/null)
by_file=$(venv/bin/python program.py file 2> /dev/null)
echo "expected: by the manager: started False, joined; by the file: started False, joined"
echo "seen:     by the manager: $by_manager; by the file: $by_file"
if [[ $by_manager != "started True, jax.distributed.initialize() must be called before"* || $by_file != "started False, joined" ]]; then
    echo "this has changed"
    exit 1
fi
