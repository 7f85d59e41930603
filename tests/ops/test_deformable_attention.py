"""The public operation against the oracle: values, gradients, dtypes, transformations and what lies outside the map."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opendet_jax.ops.deformable_attention import deformable_attention, reference, xla
from tests.ops.deformable_attention_cases import SHAPES, arguments, assert_equal_to_rounding, with_gradients

TOKENS = sum(h * w for h, w in SHAPES)
fast = with_gradients(deformable_attention)
oracle = with_gradients(reference.deformable_attention)


@pytest.mark.parametrize("seed", range(3))
def test_equals_the_oracle_with_gradients(seed):
    args = arguments(seed)
    assert_equal_to_rounding(fast(*args), oracle(*args))


@pytest.mark.parametrize("rows", [1, 10, 1000])
def test_the_gradients_are_those_of_all_parts_of_the_queries(monkeypatch, rows):
    args = arguments()
    monkeypatch.setattr(xla, "ROWS_AT_ONCE", rows)  # of 36
    gradients = jax.jit(partial(xla.backward, level_shapes=SHAPES))(*args)
    assert_equal_to_rounding(gradients, oracle(*args)[1:])


def test_gradient_equals_finite_differences():
    *inputs, cotangent = map(np.asarray, arguments())
    rng = np.random.default_rng(1)
    ways = [rng.normal(size=x.shape).astype(np.float32) for x in inputs]

    def along(step):
        moved = [x + np.float32(step) * way for x, way in zip(inputs, ways, strict=True)]
        return (np.asarray(fast(*moved, cotangent)[0]) * cotangent).sum()

    _, *gradients = fast(*inputs, cotangent)
    analytic = sum((np.asarray(gradient) * way).sum() for gradient, way in zip(gradients, ways, strict=True))
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
    for array in fast(value, jnp.full_like(locations, place), weights, cotangent):
        assert not np.any(np.asarray(array))


def test_images_do_not_mix():
    value, locations, weights, cotangent = arguments()
    full = fast(value, locations, weights, cotangent)
    changed = fast(value.at[1].add(1.0), locations.at[1].add(0.1), weights, cotangent)
    for before, after in zip(full, changed, strict=True):
        np.testing.assert_array_equal(before[0], after[0])


def test_vmap_equals_a_loop():
    args = [jnp.stack(pair) for pair in zip(arguments(0), arguments(1), strict=True)]
    mapped = jax.vmap(fast)(*args)
    for i in range(2):
        assert_equal_to_rounding([x[i] for x in mapped], fast(*(x[i] for x in args)))


def test_without_jit():
    args = arguments(shapes=((2, 3),), queries=2, points=1)
    with jax.disable_jit():
        alone = with_gradients(deformable_attention, ((2, 3),))(*args)
    assert_equal_to_rounding(alone, with_gradients(reference.deformable_attention, ((2, 3),))(*args))


def test_bfloat16_values_accumulate_in_float32():
    value, locations, weights, cotangent = arguments()
    value, cotangent = value.astype(jnp.bfloat16), cotangent.astype(jnp.bfloat16)
    out, *gradients = fast(value, locations, weights, cotangent)
    exact = fast(value.astype(jnp.float32), locations, weights, cotangent.astype(jnp.float32))
    assert [x.dtype for x in (out, *gradients)] == [jnp.bfloat16, jnp.bfloat16, jnp.float32, jnp.float32]
    np.testing.assert_array_equal(out, exact[0].astype(jnp.bfloat16))
    np.testing.assert_array_equal(gradients[0], exact[1].astype(jnp.bfloat16))
    assert_equal_to_rounding(gradients[1:], exact[2:])


def test_levels_that_do_not_have_the_tokens_are_refused():
    value, locations, weights, _ = arguments()
    with pytest.raises(ValueError, match=r"levels .* have 48 cells, value has 49 tokens"):
        deformable_attention(value, ((5, 7), (3, 4), (1, 1)), locations, weights)


def test_without_gradient_nothing_of_the_backward_pass_is_computed():
    value, locations, weights, _ = arguments()
    text = str(jax.make_jaxpr(lambda *a: deformable_attention(a[0], SHAPES, *a[1:]))(value, locations, weights))
    assert "deformable_attention_forward" in text
    assert "deformable_attention_backward" not in text
