"""Arguments of deformable attention for tests, and what is computed of them."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

SHAPES = ((5, 7), (3, 4), (1, 2))


def arguments(seed=0, shapes=SHAPES, batch=2, queries=9, heads=2, width=4, points=3):
    """Value, locations, weights and cotangent. About a third of the points lie outside the map."""
    rng = np.random.default_rng(seed)
    value = rng.normal(size=(batch, sum(h * w for h, w in shapes), heads, width))
    locations = rng.uniform(-0.3, 1.3, (batch, queries, heads, len(shapes), points, 2))
    weights = rng.uniform(size=(batch, queries, heads, len(shapes), points))
    cotangent = rng.normal(size=(batch, queries, heads * width))
    return tuple(jnp.asarray(x, jnp.float32) for x in (value, locations, weights, cotangent))


@cache
def with_gradients(operation, shapes=SHAPES):
    """The compiled function (value, locations, weights, cotangent) → output and the gradients of the first three."""

    def run(value, locations, weights, cotangent):
        out, pull = jax.vjp(lambda v, x, a: operation(v, shapes, x, a), value, locations, weights)
        return out, *pull(cotangent)

    return jax.jit(run)


def assert_equal_to_rounding(got, want, tolerance=1e-6):
    """Output and gradients, each to `tolerance` of its own largest number (those of locations reach 40)."""
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * max(1.0, np.abs(theirs).max()))


MACHINES = {
    "cpu": AbstractDevice(device_kind="cpu", num_cores=None, platform="cpu"),
    "cuda": AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu"),
    "tpu": AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu"),
}


def lowered(function, args, platform: str, devices: int = 1) -> str:
    """The program for a platform that need not be here; Pallas asks its device what it can."""
    mesh = AbstractMesh((devices,), ("data",), (AxisType.Auto,), abstract_device=MACHINES[platform])
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(function).trace(*args).lower(lowering_platforms=(platform,)).as_text()


def kernels_in(text: str) -> dict[str, int]:
    triton = text.count("__gpu$xla.gpu.triton") + text.count("triton_kernel_call_ffi")
    return {"triton": triton, "mosaic": text.count("tpu_custom_call")}
