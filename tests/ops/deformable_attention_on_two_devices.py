"""Run by test_devices.py in a process that has two devices; prints "ok" at its end."""

import re

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from opendet_jax.ops.deformable_attention import deformable_attention
from tests.ops.deformable_attention_cases import SHAPES, arguments, with_gradients

COLLECTIVE = r" (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(-start)?\("


def main() -> None:
    assert jax.device_count() == 2
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    by_image = NamedSharding(mesh, PartitionSpec("data"))
    args = arguments(batch=4)
    alone = with_gradients(deformable_attention)(*args)
    split = jax.device_put(args, by_image)

    def compiled(*args):
        return jax.jit(with_gradients(deformable_attention)).lower(*args).compile()

    assert re.search(COLLECTIVE, compiled(*split).as_text()), "without the mesh XLA gathers: the pattern finds it"
    with jax.set_mesh(mesh):
        program = compiled(*split)
    assert not re.search(COLLECTIVE, program.as_text())
    for got, want in zip(program(*split), alone, strict=True):
        assert got.sharding.is_equivalent_to(by_image, got.ndim)
        np.testing.assert_allclose(got, want, atol=1e-6)

    odd = arguments(batch=3)[:3]

    def forward(value, locations, weights):
        return deformable_attention(value, SHAPES, locations, weights)

    with jax.set_mesh(mesh):
        uneven = jax.jit(forward)(*odd)
        own = jax.shard_map(forward, in_specs=by_image.spec, out_specs=by_image.spec, check_vma=False)
        inside = jax.jit(own)(*split[:3])
    np.testing.assert_allclose(uneven, jax.jit(forward)(*odd), atol=1e-6)
    np.testing.assert_allclose(inside, alone[0], atol=1e-6)
    print("ok")


if __name__ == "__main__":
    main()
