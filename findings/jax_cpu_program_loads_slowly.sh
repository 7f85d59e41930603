#!/usr/bin/env bash
# XLA's CPU programs take seconds to minutes to load from the persistent cache: quadratic in the number of operations.
#
# Expected: a program that was compiled is read from disk in a time that grows as the program does.
# Seen:     four times the layers take about fifteen times as long to load. Each operation that was handed to the YNN
#           library (sums and products, by default) is looked for among all operations when it is read, one by one. With
#           xla_cpu_experimental_ynn_fusion_type naming products alone, this program loads many times faster.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv" || exit 2
"$folder/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 || exit 2
cd "$folder"
venv/bin/python - <<'PYTHON'
import time

import jax
import jax.numpy as jnp
from jax.experimental.serialize_executable import deserialize_and_load, serialize


def seconds_to_load(layers, **options):
    def function(x):
        for i in range(layers):
            x = jnp.tanh(x - x.sum(axis=1, keepdims=True) / (i + 1))
        return x

    x = jnp.ones((64, 64))
    program = jax.jit(function).lower(x).compile(compiler_options=options or None)
    stored = serialize(program)
    start = time.perf_counter()
    loaded = deserialize_and_load(*stored)
    spent = time.perf_counter() - start
    assert jnp.array_equal(loaded(x), program(x))
    return spent


few, many = 500, 2000
short, long = seconds_to_load(few), seconds_to_load(many)
spared = seconds_to_load(many, xla_cpu_experimental_ynn_fusion_type="LIBRARY_FUSION_TYPE_DOT")
print("jaxlib", jax.lib.__version__)
print(f"expected  about {many / few:.0f} times as long for {many / few:.0f} times the layers")
print(f"seen      {long / short:.0f} times ({short:.2f} and {long:.2f} s); sums left to XLA: {spared:.2f} s")
if long / short < 2 * many / few or spared > long / 3:
    raise SystemExit("this has changed")
PYTHON
