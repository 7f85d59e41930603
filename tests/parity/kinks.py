"""Where float32 cannot tell on which side of a kink a number lies, and the sides that float64 takes.

The gradient of a ReLU jumps at zero, that of a ReLU6 at six too, and that of a bilinear reading, with respect to where
it reads, at the border of a cell. Among the millions of hidden units and sampling points of a step a few lie within a
rounding error of such a place, and which side they fall on differs from processor to processor; one of them moves
gradient norms by 4e-4, and by more where few queries reach a parameter. The authors' numbers are of a run in float64,
so these units get the values, and these points the sides, that float64 gives them; the others keep their own:
`at_kinks(kinks)` around the forward pass and the losses. They come from
`python -m tests.parity.float64 tests.parity.kinks FILE OUT`.

In training (trajectory.py) every step of a run in float64 notes the units and points that are nearest to a kink
(`nearest_to_kinks`), and the run in float32 takes their sides (`sides`, `with_sides`).
"""

import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from opendet_jax.model import layers
from tests.parity.step import ProgramStep
from tests.parity.vectors import Vectors

NEAR = 1e-5  # twice the largest error of a hidden unit in float32
NEAR_CELL = 2e-5  # of a cell's width: twice the largest error of where a point reads
ASIDE = 4e-7  # of a level's width: so far from a border that float32 keeps a point on its side
MODULES = "linear1", "layers_0", "layers_1"  # of FeedForward, MLP and Projection: the layers that a ReLU follows

NEAREST = 64  # to a kink: so many units or coordinates of a tensor are looked at in training

Kinks = dict[str, tuple[np.ndarray, np.ndarray]]  # path/call → flat indices, values
Change = Callable[[str, jax.Array, Any], jax.Array]


@contextmanager
def watched(change: Change) -> Iterator[None]:
    """Calls `change(path/call, x, scale)` on what enters each ReLU (scale None), and on where each deformable attention
    reads: `scale` brings its locations to cells, whose borders are the numbers n + ½."""
    calls = Counter()
    attention = layers.deformable_attention

    def reading(value, level_shapes, locations, weights):
        calls["points"] += 1
        scale = np.array([(w, h) for h, w in level_shapes])[:, None]
        return attention(value, level_shapes, change(f"points/{calls['points']}", locations, scale), weights)

    def interceptor(call, args, kwargs, context):
        hidden = call(*args, **kwargs)
        module = context.module
        if type(module) is not nn.Dense or module.name not in MODULES:
            return hidden
        path = "/".join(module.path)
        calls[path] += 1
        return change(f"{path}/{calls[path]}", hidden, None)

    with nn.intercept_methods(interceptor), patch.object(layers, "deformable_attention", reading):
        yield


@contextmanager
def at_kinks(kinks: Kinks) -> Iterator[None]:
    """Within, the hidden units and points of `kinks` have their values there; gradients pass as ever."""

    def change(name: str, x: jax.Array, scale: Any) -> jax.Array:
        index, value = kinks.pop(name)
        flat = x.reshape(-1)
        error = jax.lax.stop_gradient(value.astype(np.float32) - flat[index])
        return flat.at[index].add(error).reshape(x.shape)

    kinks = dict(kinks)
    with watched(change):
        yield
    assert not kinks, f"{list(kinks)}: not called"


def find_kinks(path: Path) -> Kinks:
    """Those of a training step on the vectors of one file."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "kinks.npz")
        subprocess.run([sys.executable, "-m", "tests.parity.float64", "tests.parity.kinks", path, out], check=True)
        arrays = dict(np.load(out))
    names = [name.removesuffix(":value") for name in arrays if name.endswith(":value")]
    return {name: (arrays[f"{name}:index"], arrays[f"{name}:value"]) for name in names}


def kinks_of(name: str) -> tuple[int, ...]:
    """Of a ReLU, and of the distiller's ReLU6."""
    return (0, 6) if "/phi" in name else (0,)


def beside_kinks(hidden: np.ndarray, kinks: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Flat indices of hidden units near a kink, and their values, or what float32 can tell from the kink."""
    flat, kinks = hidden.reshape(-1), np.array(kinks)
    kink = kinks[np.abs(flat[:, None] - kinks).argmin(1)]
    off = flat - kink
    index = np.flatnonzero(np.abs(off) < NEAR)
    kink, off = kink[index], off[index]
    return index, kink + np.sign(off) * np.maximum(np.abs(off), kink * 2e-7)


def beside_borders(locations: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Flat indices of coordinates near a border between cells, and locations beside it that float32 reads there."""
    flat, scale = locations.reshape(-1), scale.reshape(-1)
    pixel = flat * scale - 0.5
    border = np.rint(pixel)
    index = np.flatnonzero(np.abs(pixel - border) < NEAR_CELL)
    border, off = border[index], (pixel - border)[index]
    aside = border + np.where(off >= 0, 1, -1) * np.maximum(np.abs(off), ASIDE * np.maximum(scale[index], 4))
    return index, (aside + 0.5) / scale[index]


def nearest_to_kinks(name: str, x: jax.Array, scale: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The units or coordinates of `x` that are nearest to a kink: flat indices, values, scales (0: a unit)."""
    flat = x.reshape(-1)
    scales = jnp.broadcast_to(0.0 if scale is None else scale, x.shape).reshape(-1)
    if scale is None:
        off = jnp.abs(flat[:, None] - jnp.array(kinks_of(name))).min(1)
    else:
        pixel = flat * scales - 0.5
        off = jnp.abs(pixel - jnp.rint(pixel))
    index = jax.lax.top_k(-off.astype("float32"), NEAREST)[1]
    return index, flat[index], scales[index]


def sides(name: str, index: np.ndarray, value: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of `nearest_to_kinks` in float64: indices and, NaN where float32 can tell the side, values beside the kink."""
    near, beside = beside_borders(value, scale) if scale.any() else beside_kinks(value, kinks_of(name))
    fixed = np.full(value.shape, np.nan)
    fixed[near] = beside
    return index, fixed


def with_sides(x: jax.Array, index: jax.Array, fixed: jax.Array) -> jax.Array:
    """`x` with the values that are not NaN; gradients pass as ever."""
    flat = x.reshape(-1)
    error = jax.lax.stop_gradient(jnp.where(jnp.isnan(fixed), 0.0, fixed - flat[index]))
    return flat.at[index].add(error.astype(flat.dtype)).reshape(x.shape)


def main(path: Path, out: Path) -> None:
    step = ProgramStep(Vectors(path), "float64")
    params = jax.tree.map(lambda x: x.astype(np.float64), step.params)

    @jax.jit
    def seen(params):
        found, scales = {}, {}

        def note(name: str, x: jax.Array, scale: Any) -> jax.Array:
            found[name] = x
            if scale is not None:
                scales[name] = np.broadcast_to(scale, x.shape)
            return x

        with watched(note):
            step.losses(params, step.forward(params))
        return found, scales

    arrays = {}
    found, scales = jax.device_get(seen(params))
    for name, x in found.items():
        assert x.dtype == np.float64, name
        if name in scales:
            index, value = beside_borders(x, scales[name])
        else:
            index, value = beside_kinks(x, kinks_of(name))
        arrays |= {f"{name}:index": index, f"{name}:value": value}
    np.savez(out, **arrays)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
