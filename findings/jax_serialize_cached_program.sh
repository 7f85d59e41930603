#!/usr/bin/env bash
# A program that jax has read from its compilation cache cannot be written by serialize_executable.
#
# Expected: jax.experimental.serialize_executable writes a compiled program, whether jax compiled it in this process or
#           read it from its cache: both run.
# Seen:     on a CPU the second is written and loaded without a word, and fails when it is called: what is written lacks
#           the compiled functions.
# Upstream: none that we know of.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv" || exit 2
"$folder/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 || exit 2
cd "$folder"
cat > program.py <<'PYTHON'
import pickle
import sys

import jax
import jax.numpy as jnp
from jax.experimental import serialize_executable

mode, file = sys.argv[1:]
jax.config.update("jax_compilation_cache_dir", "cache")
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
x = jnp.ones((40, 40))
if mode == "write":
    compiled = jax.jit(lambda x: jnp.sin(x) @ jnp.cos(x).T).lower(x).compile()
    jax.block_until_ready(compiled(x))
    with open(file, "wb") as out:
        pickle.dump(serialize_executable.serialize(compiled), out)
else:
    with open(file, "rb") as written:
        program = serialize_executable.deserialize_and_load(*pickle.load(written))
    try:
        jax.block_until_ready(program(x))
        print("runs")
    except jax.errors.JaxRuntimeError as error:
        print(str(error).partition(" (")[0])
PYTHON
venv/bin/python program.py write compiled
venv/bin/python program.py write cached  # the same program: this process finds it in the cache
first=$(venv/bin/python program.py read compiled)
second=$(venv/bin/python program.py read cached)
echo "expected: compiled: runs; from the cache: runs"
echo "seen:     compiled: $first; from the cache: $second"
if [[ $first != runs || $second != "NOT_FOUND: Function"*"not found" ]]; then
    echo "this has changed"
    exit 1
fi
