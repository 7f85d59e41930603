#!/usr/bin/env bash
# optax's Adam subtracts β₂^t from 1 in float32, so that its first hundreds of updates are all off in the same direction.
#
# Expected: where the gradient never changes, every update of Adam is the learning rate, to float32's 1e-7 or a few of it.
# Seen:     0.4e-5 to 1.1e-5 less in the first steps: 1 − 0.999^t has lost its last digits. PyTorch takes it in float64.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv" || exit 2
"$folder/venv/bin/pip" install -q optax==0.2.8 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 || exit 2
cd "$folder"
JAX_PLATFORMS=cpu venv/bin/python - <<'PYTHON'
import jax
import jax.numpy as jnp
import optax

adam = optax.scale_by_adam()
gradient = jnp.float32(0.02)
state, update = adam.init(gradient), jax.jit(adam.update)
seen = []
for _ in range(3):
    scaled, state = update(gradient, state)
    seen.append(f"{float(scaled) - 1:.0e}")

print("optax", optax.__version__)
print("expected ['-5e-07', '-5e-07', '-5e-07'] or less: the update divided by the learning rate, less 1; eps is 5e-7 of it")
print("seen    ", seen)
if seen != ["-7e-06", "-1e-05", "-4e-06"]:
    raise SystemExit("this has changed")
PYTHON
