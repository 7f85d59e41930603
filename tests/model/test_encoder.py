"""The encoder: reference points, padding that influences nothing, recomputation and half precision."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opendet_jax.config import ModelConfig
from opendet_jax.model.encoder import Encoder, cell_centres
from opendet_jax.model.neck import Neck

SMALL = ModelConfig(width=32, num_heads=4, num_points=2, ffn_width=64, encoder_layers=2)


@pytest.fixture(scope="module")
def features():
    """Two images, the second padded."""
    maps = [jax.random.normal(jax.random.key(s), (2, 64 // s, 96 // s, 8)) for s in (8, 16, 32)]
    mask = np.ones((2, 64, 96), bool)
    mask[1, 40:], mask[1, :, 50:] = False, False
    return jax.jit(Neck(SMALL.width).init_with_output)(jax.random.key(0), maps, jnp.asarray(mask))[0]


@pytest.fixture(scope="module")
def params(features):
    """With offsets and weights that depend on the query, which at the start they do not."""
    params = jax.jit(Encoder(SMALL).init)(jax.random.key(1), features)
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), params)


def loss(params, features, config=SMALL):
    memory = Encoder(config).apply(params, features)
    return jnp.where(memory.valid[..., None], memory.tokens**2, 0).sum(), memory.tokens


def test_cell_centres_are_normalised_by_the_photograph():
    centres = cell_centres(((1, 2), (2, 1)), jnp.asarray([[[1.0, 1.0], [0.5, 1.0]]]))
    np.testing.assert_allclose(centres[0], [[0.25, 0.5], [0.75, 0.5], [1.0, 0.25], [1.0, 0.75]], rtol=1e-6)


def test_padded_tokens_influence_no_valid_one(features, params):
    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    valid = features.valid[..., None]
    hidden = dataclasses.replace(
        features,
        tokens=jnp.where(valid, features.tokens, 37.0),
        positions=jnp.where(valid, features.positions, -5.0),
    )
    (_, tokens), gradient = run(params, features)
    (_, same), same_gradient = run(params, hidden)
    np.testing.assert_array_equal(jnp.where(valid, tokens, 0), jnp.where(valid, same, 0))
    jax.tree.map(np.testing.assert_array_equal, gradient, same_gradient)


def test_remat_changes_nothing(features, params):
    config = dataclasses.replace(SMALL, remat=True)
    plain = jax.jit(jax.grad(lambda p: loss(p, features)[0]))(params)
    rematted = jax.jit(jax.grad(lambda p: loss(p, features, config)[0]))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), plain, rematted)


def test_bfloat16_activations(features, params):
    config = dataclasses.replace(SMALL, dtype="bfloat16")
    half = dataclasses.replace(features, tokens=features.tokens.astype(jnp.bfloat16))
    memory = Encoder(config).apply(params, half)
    assert memory.tokens.dtype == jnp.bfloat16
    np.testing.assert_allclose(memory.tokens.astype(jnp.float32), loss(params, features)[1], atol=0.3)
