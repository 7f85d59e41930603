#!/usr/bin/env bash
# On a CPU, sums over the rows of a thin product are wrong from column 32,768 on.
#
# Expected: |w x| of 40,000 columns x with three numbers each, w of three rows, compiled: what is computed step by step.
# Seen:     jax 0.10.2 gives other numbers from column 32,768 on. Without the library YNN, to which XLA hands the
#           product together with the sum, they are right.
# Upstream: https://github.com/jax-ml/jax/issues/39103 (mended in jax 0.11)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv" || exit 2
"$folder/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 || exit 2
cd "$folder"
cat > product.py <<'PYTHON'
import jax
import jax.numpy as jnp
import numpy as np

rng = np.random.default_rng(0)
x = rng.uniform(1, 2, (40_000, 3)).astype(np.float32)
w = rng.uniform(1, 2, (3, 3)).astype(np.float32)


def lengths(x, w):
    return jnp.abs(jnp.einsum("ij,nj->in", w, x)).sum(0)


want = (x.astype(np.float64) @ w.T.astype(np.float64)).sum(1)
for handed_over in ("products and sums", "products", "nothing"):
    kinds = {"products": "LIBRARY_FUSION_TYPE_DOT", "nothing": ""}
    options = {"xla_cpu_experimental_ynn_fusion_type": kinds[handed_over]} if handed_over in kinds else {}
    got = np.asarray(jax.jit(lengths, compiler_options=options)(x, w))
    wrong = np.flatnonzero(np.abs(got / want - 1) > 1e-4)
    print(handed_over, f"wrong from {wrong[0]} on" if len(wrong) > 7000 else f"{len(wrong)} wrong", sep=": ", end="; ")
by_steps = np.asarray(lengths(x, w))
print("step by step:", int((np.abs(by_steps / want - 1) > 1e-4).sum()), "wrong")
PYTHON
seen=$(venv/bin/python product.py)
echo "expected: nothing wrong, whatever is handed to YNN"
echo "seen:     $seen"
if [[ $seen != "products and sums: wrong from 32768 on; products: wrong from 32768 on; nothing: 0 wrong; step by step: 0 wrong" ]]; then
    echo "this has changed"
    exit 1
fi
