"""Swin: stochastic depth, shifted windows and published sizes; tests/parity has its numbers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opendet_jax.config import SwinConfig
from opendet_jax.model.swin import PatchMerging, Swin, gelu, shifted_regions

TINY = SwinConfig(embed_dim=8, depths=(2, 2, 2, 2), num_heads=(1, 2, 2, 4), window_size=3, drop_path_rate=0.3)


@pytest.fixture(scope="module")
def images():
    return jax.random.normal(jax.random.key(0), (1, 32, 32, 3))


@pytest.fixture(scope="module")
def params(images):
    return jax.jit(Swin(TINY).init)(jax.random.key(1), images)


def count(params):
    return sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize(
    ("embed_dim", "depth", "heads", "window", "millions"),
    [(96, 6, 3, 7, 27.5), (96, 18, 3, 7, 48.8), (192, 18, 6, 12, 195.2)],
)
def test_published_sizes(embed_dim, depth, heads, window, millions):
    config = SwinConfig(embed_dim, (2, 2, depth, 2), tuple(heads * 2**i for i in range(4)), window)
    images = jnp.zeros((1, 64, 64, 3))
    shapes = jax.eval_shape(Swin(config).init, jax.random.key(0), images)
    assert round(count(shapes) / 1e6, 1) == millions
    maps = jax.eval_shape(lambda: Swin(config).init_with_output(jax.random.key(0), images)[0])
    assert [m.shape for m in maps] == [(1, 64 // s, 64 // s, embed_dim * s // 4) for s in (8, 16, 32)]


@pytest.mark.parametrize(("dtype", "rounding"), [("float32", 3e-7), ("bfloat16", 2**-8)])
def test_gelu_and_its_derivative(dtype, rounding):
    x, cotangent = 3 * jax.random.normal(jax.random.key(0), (2, 10_000), dtype)
    ours, pull = jax.vjp(gelu, x)
    wide = np.asarray(x, np.float64)
    cdf = np.array([0.5 * math.erfc(-value / math.sqrt(2)) for value in wide])
    derivative = cdf + wide * np.exp(-(wide**2) / 2) / math.sqrt(2 * math.pi)
    assert ours.dtype == x.dtype
    # 1 + erf is rounded as numbers near 1 are, and |x| and the cotangent are below 12; the derivative has two terms.
    near = 12 * 2**-24
    np.testing.assert_allclose(np.asarray(ours, np.float64), wide * cdf, rtol=rounding, atol=near)
    expected, found = derivative * np.asarray(cotangent, np.float64), np.asarray(pull(cotangent)[0], np.float64)
    np.testing.assert_allclose(found, expected, rtol=rounding, atol=2 * near)


def test_drop_path_needs_a_key_and_drops_whole_samples(images, params):
    images = jnp.tile(images, (8, 1, 1, 1))
    run = jax.jit(lambda key: Swin(TINY).apply(params, images, deterministic=False, rngs={"dropout": key})[0])
    out = np.asarray(run(jax.random.key(2)))
    assert np.abs(out - out[0]).max() > 0.1
    np.testing.assert_array_equal(out, run(jax.random.key(2)))
    still = np.asarray(jax.jit(Swin(TINY).apply)(params, images)[0])
    np.testing.assert_allclose(still, np.broadcast_to(still[0], still.shape), rtol=1e-5, atol=1e-5)  # rounding by place


def test_remat_changes_nothing(images, params):
    def loss(params, remat):
        out = Swin(TINY, remat).apply(params, images, deterministic=False, rngs={"dropout": jax.random.key(2)})
        return sum((x**2).mean() for x in out)

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    plain = gradient(params, "no")
    for kept in ("nothing", "products"):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), plain, gradient(params, kept))


def test_bfloat16_activations(images, params):
    half = jax.jit(Swin(TINY, dtype=jnp.bfloat16).apply)(params, images)
    for ours, full in zip(half, jax.jit(Swin(TINY).apply)(params, images), strict=True):
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_allclose(ours.astype(jnp.float32), full, atol=0.1)


def test_shifted_regions_separate_what_rolling_brought_together():
    regions = shifted_regions(6, 6, 3, 1)
    assert (regions[0] == regions[0, 0]).all()
    assert len(np.unique(regions[-1])) == 4
    np.testing.assert_array_equal(regions[1].reshape(3, 3)[:, 1] != regions[1].reshape(3, 3)[:, 2], True)


def test_merging_takes_the_square_column_by_column():
    x = jnp.arange(4.0).reshape(1, 2, 2, 1)
    layer = PatchMerging()
    params = {"norm": {"scale": jnp.ones(4), "bias": jnp.zeros(4)}, "reduction": {"kernel": jnp.eye(4, 2)}}
    out = layer.apply({"params": params}, x)
    deviation = np.sqrt(1.25 + 1e-5)
    np.testing.assert_allclose(out[0, 0, 0], np.array([0 - 1.5, 2 - 1.5]) / deviation, rtol=1e-5)
