"""Operations of a traced program, beside those that can be counted by hand and those that XLA counts."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from opendet_jax.scaling.program import products

A, B = jnp.ones((4, 5)), jnp.ones((5, 6))
PRODUCT = 2 * 4 * 5 * 6


def count(function, *arguments) -> int:
    return products(jax.make_jaxpr(function)(*arguments))


def test_a_product_in_each_kind_of_program():
    assert count(jnp.matmul, A, B) == count(jax.jit(jnp.matmul), A, B) == PRODUCT
    assert count(lambda a: a + 1, A) == 0
    assert count(lambda a, b: jax.lax.fori_loop(0, 7, lambda _, x: x + a @ b, jnp.zeros((4, 6))), A, B) == 7 * PRODUCT
    unknown = lambda n: jax.lax.fori_loop(0, n, lambda _, x: x + A @ B, jnp.zeros((4, 6)))  # noqa: E731
    assert count(unknown, 7) == PRODUCT
    assert count(lambda yes: jax.lax.cond(yes, lambda: A @ B, lambda: A @ B + A @ B), True) == 2 * PRODUCT
    batched = jax.vmap(jnp.matmul)
    assert count(batched, jnp.ones((3, 4, 5)), jnp.ones((3, 5, 6))) == 3 * PRODUCT


def test_a_gradient_has_two_more_products_and_three_when_it_computes_again():
    def loss(a, b):
        return jnp.sin(a @ b).sum()

    assert count(jax.value_and_grad(loss, (0, 1)), A, B) == 3 * PRODUCT
    again = jax.checkpoint(loss, policy=jax.checkpoint_policies.nothing_saveable)
    assert count(jax.value_and_grad(again, (0, 1)), A, B) == 4 * PRODUCT


@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_is_what_xla_counts(groups):
    image, kernel = jnp.ones((2, 8, 8, 4)), jnp.ones((3, 3, 4 // groups, 6))

    def convolved(image, kernel):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            image, kernel, (1, 1), "VALID", dimension_numbers=numbers, feature_group_count=groups
        )

    assert count(convolved, image, kernel) == 2 * (2 * 6 * 6 * 6) * (3 * 3 * 4 // groups)
    if groups == 1:
        analysis = jax.jit(convolved).lower(image, kernel).cost_analysis()
        assert analysis["flops"] == count(convolved, image, kernel)


def test_nothing_in_kernels_and_all_devices():
    def body(a, b, out):
        out[...] = a[...] @ b[...]

    kernel = pl.pallas_call(body, out_shape=jax.ShapeDtypeStruct((4, 6), jnp.float32))
    assert count(kernel, A, B) == 0
    rows = PartitionSpec("data")
    mesh = AbstractMesh((2,), ("data",), axis_types=(AxisType.Auto,))
    split = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(rows, PartitionSpec()), out_specs=rows)
    assert count(split, A, B) == PRODUCT
