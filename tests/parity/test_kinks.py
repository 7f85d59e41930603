"""The places where a gradient jumps: that float32 is put on the side that is asked for, and that the side matters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opendet_jax.model.layers import DeformableAttention, Pyramid
from tests.parity.kinks import at_kinks, beside_borders, beside_kinks

SHAPES = ((4, 6), (2, 3), (1, 2), (1, 1))
TOKENS = sum(h * w for h, w in SHAPES)


def test_float32_reads_on_the_side_of_float64():
    rng = np.random.default_rng(0)
    scale = rng.integers(1, 64, 20_000).astype(np.float64)
    border = rng.integers(-1, scale + 1)
    off = rng.choice([-1, 1], scale.shape) * 10.0 ** rng.uniform(-12, -4, scale.shape)
    index, places = beside_borders((border + off + 0.5) / scale, scale)
    np.testing.assert_array_equal(index, np.flatnonzero(np.abs(off) < 2e-5))
    pixels = places.astype(np.float32) * scale[index].astype(np.float32) - np.float32(0.5)
    np.testing.assert_array_equal(np.floor(pixels) >= border[index], off[index] > 0)
    assert np.abs(pixels - border[index] - off[index]).max() < 5e-5


def test_units_keep_their_side_of_six():
    hidden = np.array([5.0, 6 - 1e-12, 6 + 1e-12, 3e-9, -3e-9, 6 - 2e-5])
    index, values = beside_kinks(hidden, (0, 6))
    np.testing.assert_array_equal(index, [1, 2, 3, 4])
    values = values.astype(np.float32)
    assert values[0] < 6 < values[1]
    np.testing.assert_allclose(values[2:], [3e-9, -3e-9], rtol=1e-6)
    assert len(beside_kinks(hidden, (0,))[0]) == 2


@pytest.fixture(scope="module")
def attention():
    """(gradient of a sum with respect to the offsets' bias, given kinks; where the point is read that stands on a
    border)."""
    module = DeformableAttention(width=8, num_heads=1, num_levels=4, num_points=1)
    rng = np.random.default_rng(1)
    tokens = jnp.asarray(rng.normal(size=(1, TOKENS, 8)), jnp.float32)
    source = Pyramid(tokens, jnp.ones((1, TOKENS), bool), jnp.ones((1, 4, 2)), SHAPES)
    query = jnp.asarray(rng.normal(size=(1, 1, 8)), jnp.float32)
    params = module.init(jax.random.key(0), query, jnp.full((1, 1, 4, 2), 0.5), source)["params"]
    ring = params["sampling_offsets"]["bias"]  # the first level is read one cell right of the reference
    reference = jnp.full((1, 1, 4, 2), 0.37).at[0, 0, 0, 0].set((2 + 0.5) / 6)  # its border between columns 2 and 3

    def gradient(kinks):
        def out(bias):
            changed = params | {"sampling_offsets": params["sampling_offsets"] | {"bias": bias}}
            with at_kinks(kinks):
                return module.apply({"params": changed}, query, reference, source).sum()

        return np.asarray(jax.grad(out)(ring))

    return gradient


def test_the_side_of_a_border_decides_the_gradient(attention):
    def on(side: float) -> np.ndarray:
        index, value = beside_borders(np.array([(3 + side + 0.5) / 6]), np.array([6.0]))
        assert len(index) == (abs(side) < 2e-5)
        return attention({"points/1": (np.array([0]), value if len(value) else np.array([(3 + side + 0.5) / 6]))})

    left, right = on(-1e-9), on(1e-9)
    assert np.abs(left - right)[0] > 0.1 * np.abs(left).max()
    np.testing.assert_allclose(left, on(-1e-3), rtol=0.02, atol=1e-4)
    np.testing.assert_allclose(right, on(1e-3), rtol=0.02, atol=1e-4)


def test_a_kink_that_nobody_reaches_is_an_error(attention):
    with pytest.raises(AssertionError, match="not called"):
        attention({"points/1": (np.array([0]), np.array([0.4])), "points/2": (np.array([0]), np.array([0.4]))})
