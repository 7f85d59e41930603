"""Hidden units so close to zero that float32 cannot tell their sign, and their values in float64.

A ReLU's gradient jumps at zero. Among the millions of hidden units of a step a few lie within a rounding error of it,
and which side they fall on differs from processor to processor; one of them moves gradient norms by 4e-4. The authors'
numbers are of a run in float64, so these units get the values that float64 gives them, the others keep their own:
`at_kinks(values)` around the forward pass. They come from `python -m tests.parity.kinks FILE OUT`, a process of its own
because float32 is written in the model: here float64 takes its place before the model is imported.
"""

import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

NEAR = 1e-5  # twice the largest error of a hidden unit in float32
MODULES = "linear1", "layers_0", "layers_1"  # of FeedForward and MLP: the layers that a ReLU follows

Kinks = dict[str, tuple[np.ndarray, np.ndarray]]  # path/call → flat indices, values


@contextmanager
def _hidden(change: Callable[[str, jax.Array], jax.Array]) -> Iterator[None]:
    """Calls `change(path/call, hidden)` on what enters each ReLU."""
    calls = Counter()

    def interceptor(call, args, kwargs, context):
        hidden = call(*args, **kwargs)
        module = context.module
        if type(module) is not nn.Dense or module.name not in MODULES:
            return hidden
        path = "/".join(module.path)
        calls[path] += 1
        return change(f"{path}/{calls[path]}", hidden)

    with nn.intercept_methods(interceptor):
        yield


@contextmanager
def at_kinks(kinks: Kinks) -> Iterator[None]:
    """Within, the hidden units of `kinks` have their values there; gradients pass through them as ever."""

    def change(name: str, hidden: jax.Array) -> jax.Array:
        index, value = kinks.pop(name)
        flat = hidden.reshape(-1)
        error = jax.lax.stop_gradient(value.astype(np.float32) - flat[index])
        return flat.at[index].add(error).reshape(hidden.shape)

    kinks = dict(kinks)
    with _hidden(change):
        yield
    assert not kinks, f"{list(kinks)}: not called"


def find_kinks(path: Path) -> Kinks:
    """Those of a training step on the vectors of one file."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "kinks.npz")
        subprocess.run([sys.executable, "-m", "tests.parity.kinks", path, out], check=True)
        arrays = dict(np.load(out))
    names = [name.removesuffix(":value") for name in arrays if name.endswith(":value")]
    return {name: (arrays[f"{name}:index"], arrays[f"{name}:value"]) for name in names}


def main(path: Path, out: Path) -> None:
    jax.config.update("jax_enable_x64", True)
    jnp.float32 = jnp.float64

    from tests.parity.step import ProgramStep
    from tests.parity.vectors import Vectors

    step = ProgramStep(Vectors(path), "float64")
    params = jax.tree.map(lambda x: x.astype(np.float64), step.params)

    @jax.jit
    def hidden_units(params):
        units = {}
        with _hidden(lambda name, hidden: units.setdefault(name, hidden)):
            step.forward(params)
        return units

    arrays = {}
    for name, hidden in hidden_units(params).items():
        hidden = np.asarray(hidden).reshape(-1)
        assert hidden.dtype == np.float64, name
        index = np.flatnonzero(np.abs(hidden) < NEAR)
        arrays |= {f"{name}:index": index, f"{name}:value": hidden[index]}
    np.savez(out, **arrays)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
