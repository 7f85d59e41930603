"""A mesh of tensor alone: images are not split, the weights are. Run by test_devices.py; prints "ok" at its end."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from opendet_jax.ops.devices import on_each_device


def main() -> None:
    assert jax.device_count() == 2
    mesh = jax.make_mesh((1, 1, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(3, 4)).astype(np.float32)
    images = rng.normal(size=(2, 3)).astype(np.float32)

    def loss(weights):
        hidden = on_each_device(lambda w, x: jnp.tanh(x @ w), images, shared=[weights], xla_splits_rest=True)
        return jnp.square(hidden).sum()

    alone = jax.grad(loss)(weights)
    with jax.set_mesh(mesh):
        split = jax.device_put(weights, NamedSharding(mesh, PartitionSpec(None, "tensor")))
        got = jax.jit(jax.grad(loss))(split)
    np.testing.assert_allclose(got, alone, rtol=1e-6)
    assert got.sharding.shard_shape(got.shape) == (3, 2), "XLA splits the weights' axis"
    print("ok")


if __name__ == "__main__":
    main()
