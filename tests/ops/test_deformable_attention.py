"""The fast form against the oracle: values, gradients, dtypes, transformations and what lies outside the map."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opendet_jax.ops.deformable_attention import deformable_attention, reference

SHAPES = ((5, 7), (3, 4), (1, 2))
TOKENS = sum(h * w for h, w in SHAPES)


def arguments(seed=0, batch=2, queries=9, heads=2, width=4, points=3):
    """About a third of the points lie outside the map."""
    rng = np.random.default_rng(seed)
    value = rng.normal(size=(batch, TOKENS, heads, width))
    locations = rng.uniform(-0.3, 1.3, (batch, queries, heads, len(SHAPES), points, 2))
    weights = rng.uniform(size=(batch, queries, heads, len(SHAPES), points))
    cotangent = rng.normal(size=(batch, queries, heads * width))
    return tuple(jnp.asarray(x, jnp.float32) for x in (value, locations, weights, cotangent))


def with_gradients(op, value, locations, weights, cotangent):
    out, pull = jax.vjp(lambda v, x, a: op(v, SHAPES, x, a), value, locations, weights)
    return out, *pull(cotangent)


@pytest.mark.parametrize("seed", range(3))
def test_equals_the_oracle_with_gradients(seed):
    args = arguments(seed)
    fast = jax.jit(lambda *a: with_gradients(deformable_attention, *a))(*args)
    slow = with_gradients(reference.deformable_attention, *args)
    for got, want in zip(fast, slow, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_gradient_equals_finite_differences():
    value, locations, weights, cotangent = arguments()
    ways = [jax.random.normal(jax.random.key(i), x.shape) for i, x in enumerate((value, locations, weights))]

    def along(step):
        moved = [x + step * way for x, way in zip((value, locations, weights), ways, strict=True)]
        return (deformable_attention(moved[0], SHAPES, *moved[1:]) * cotangent).sum()

    _, *gradients = with_gradients(deformable_attention, value, locations, weights, cotangent)
    analytic = sum((gradient * way).sum() for gradient, way in zip(gradients, ways, strict=True))
    step = 1e-4
    np.testing.assert_allclose((along(step) - along(-step)) / (2 * step), analytic, rtol=1e-2)


def test_one_point_on_a_cell_centre_reads_the_cell():
    value = jnp.arange(TOKENS * 2.0).reshape(1, TOKENS, 1, 2)
    centre = jnp.asarray([(3 + 0.5) / 7, (2 + 0.5) / 5])
    locations = jnp.full((1, 1, 1, 3, 1, 2), 5.0).at[0, 0, 0, 0, 0].set(centre)
    out = deformable_attention(value, SHAPES, locations, jnp.ones((1, 1, 1, 3, 1)))
    np.testing.assert_allclose(out[0, 0], value[0, 2 * 7 + 3, 0], rtol=1e-6)


@pytest.mark.parametrize("place", [-1e30, -2.0, 3.0, 1e30])
def test_far_points_read_nothing_and_have_no_gradient(place):
    value, locations, weights, cotangent = arguments()
    out, *gradients = with_gradients(deformable_attention, value, jnp.full_like(locations, place), weights, cotangent)
    for array in (out, *gradients):
        assert not np.any(np.asarray(array))


def test_images_do_not_mix():
    value, locations, weights, cotangent = arguments()
    full = with_gradients(deformable_attention, value, locations, weights, cotangent)
    changed = with_gradients(deformable_attention, value.at[1].add(1.0), locations.at[1].add(0.1), weights, cotangent)
    for before, after in zip(full, changed, strict=True):
        np.testing.assert_array_equal(before[0], after[0])


def test_vmap_equals_a_loop():
    args = [jnp.stack(pair) for pair in zip(arguments(0), arguments(1), strict=True)]
    mapped = jax.vmap(lambda *a: with_gradients(deformable_attention, *a))(*args)
    for i in range(2):
        alone = with_gradients(deformable_attention, *(x[i] for x in args))
        for got, want in zip(mapped, alone, strict=True):
            np.testing.assert_allclose(got[i], want, atol=1e-5)


def test_bfloat16_values_accumulate_in_float32():
    value, locations, weights, cotangent = arguments()
    value = value.astype(jnp.bfloat16)
    out, *gradients = with_gradients(deformable_attention, value, locations, weights, cotangent.astype(jnp.bfloat16))
    exact = with_gradients(
        deformable_attention,
        value.astype(jnp.float32),
        locations,
        weights,
        cotangent.astype(jnp.bfloat16).astype(jnp.float32),
    )
    assert [x.dtype for x in (out, *gradients)] == [jnp.bfloat16, jnp.bfloat16, jnp.float32, jnp.float32]
    np.testing.assert_array_equal(out, exact[0].astype(jnp.bfloat16))
    np.testing.assert_array_equal(gradients[0], exact[1].astype(jnp.bfloat16))
    for got, want in zip(gradients[1:], exact[2:], strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)
