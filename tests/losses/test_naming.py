"""Text noise, the two means over tokens, and the chunked language model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from opendet_jax.losses.naming import (
    TextNoise,
    draw_text_noise,
    naming_loss,
    noisy_texts,
    text_denoising_loss,
    text_sigma,
)
from opendet_jax.ops.chunks import real_token_losses

B, R, T, E, V = 4, 5, 3, 6, 9
REAL = np.array([[0, 0, 0, 0, 0], [1, 0, 1, 0, 0], [1, 1, 1, 1, 1], [0, 1, 0, 0, 0]], bool)


def language_model(weights):
    """A stand-in with parameters bound to it, as the train step has it."""

    def token_losses(weights, prompts, tokens, keys):
        logits = jnp.einsum("re,tev->rtv", prompts / jnp.linalg.norm(prompts, axis=1, keepdims=True), weights)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=-1)[..., 0]
        return jnp.where(tokens != 0, -chosen, 0.0)

    return Partial(token_losses, weights)


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    tokens = rng.integers(2, V, (B, R, T))
    tokens[..., -1] = rng.integers(0, 2, (B, R))
    prompts = rng.normal(size=(B, R, E)).astype(np.float32)
    weights = rng.normal(size=(T, E, V)).astype(np.float32)
    return jnp.asarray(prompts), jnp.asarray(tokens), jnp.asarray(weights)


def chunked(prompts, weights, tokens, real, chunk=3):
    return real_token_losses(language_model(weights), prompts, tokens, real, chunk=chunk)


def at_once(prompts, weights, tokens, real):
    prompts = jnp.where(real[..., None], prompts, 1.0)
    losses = language_model(weights)(prompts.reshape(-1, E), tokens.reshape(-1, T), None).reshape(tokens.shape)
    return jnp.where(real[..., None], losses, 0.0)


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_chunks_change_nothing(rows, chunk):
    prompts, tokens, weights = rows
    cotangent = jnp.asarray(np.random.default_rng(1).normal(size=(B, R, T)), jnp.float32)
    want, want_pull = jax.vjp(lambda p, w: at_once(p, w, tokens, jnp.asarray(REAL)), prompts, weights)
    got, got_pull = jax.vjp(jax.jit(lambda p, w: chunked(p, w, tokens, jnp.asarray(REAL), chunk)), prompts, weights)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    for a, b in zip(got_pull(cotangent), want_pull(cotangent), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_rows_that_are_not_real_influence_nothing(rows):
    prompts, tokens, weights = rows
    losses = jax.jit(jax.value_and_grad(lambda p, w, t: chunked(p, w, t, jnp.asarray(REAL)).sum(), argnums=(0, 1)))
    want = losses(prompts, weights, tokens)
    got = losses(jnp.where(REAL[..., None], prompts, jnp.nan), weights, jnp.where(REAL[..., None], tokens, V - 1))
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert (got[1][0][~REAL] == 0).all()


def test_only_chunks_with_a_real_row_are_computed(rows):
    prompts, tokens, weights = rows
    calls = []

    def count(real, chunk):
        def token_losses(weights, prompts, tokens, keys):
            jax.debug.callback(lambda: calls.append(1))
            return language_model(weights)(prompts, tokens, keys)

        calls.clear()
        real_token_losses(
            Partial(token_losses, weights), prompts, tokens, jnp.asarray(real), chunk=chunk
        ).block_until_ready()
        jax.effects_barrier()
        return len(calls)

    assert REAL.sum() == 8
    assert count(REAL, 3) == 3
    assert count(REAL, 8) == 1
    assert count(np.zeros_like(REAL), 3) == 0


def test_no_real_row_gives_zero_and_no_gradient(rows):
    prompts, tokens, weights = rows
    loss = lambda p, w: chunked(p, w, tokens, jnp.zeros((B, R), bool)).sum()  # noqa: E731
    value, gradients = jax.value_and_grad(loss, argnums=(0, 1))(prompts, weights)
    assert value == 0
    assert all((g == 0).all() for g in gradients)


def test_a_row_keeps_its_randomness_whatever_chunk_it_falls_into(rows):
    _, tokens, _ = rows

    def token_losses(prompts, tokens, keys):
        return jnp.broadcast_to(jax.vmap(jax.random.uniform)(keys)[:, None], tokens.shape)

    keys = jax.random.split(jax.random.key(3), (B, R))
    want = jax.vmap(jax.vmap(jax.random.uniform))(keys)
    for real, chunk in ((np.ones_like(REAL), 5), (REAL, 3)):
        losses = real_token_losses(Partial(token_losses), jnp.ones((B, R, E)), tokens, jnp.asarray(real), keys, chunk)
        np.testing.assert_array_equal(losses[..., 0], np.where(real, want, 0))


def test_means_over_tokens():
    losses = jnp.array([[[1.0, 2.0, 50.0], [4.0, 50.0, 50.0]], [[6.0, 8.0, 9.0], [50.0, 50.0, 50.0]], [[50.0] * 3] * 2])
    tokens = jnp.array([[[5, 1, 0], [1, 0, 0]], [[5, 5, 1], [5, 5, 1]], [[5, 5, 1], [5, 5, 1]]])
    real = jnp.array([[True, True], [True, False], [False, False]])
    assert naming_loss(losses, tokens, real) == pytest.approx((1 + 2 + 4 + 6 + 8 + 9) / 6)
    # Means 7/3 and 23/3; the third image has no object and is no part of the mean.
    assert text_denoising_loss(losses, tokens, real) == pytest.approx((7 / 3 + 23 / 3) / 2)
    nothing = jnp.zeros_like(real)
    assert naming_loss(losses, tokens, nothing) == text_denoising_loss(losses, tokens, nothing) == 0


def test_sigma_of_the_noise():
    rng = np.random.default_rng(2)
    texts = rng.normal(0.3, 2.0, (3, 6, 8)).astype(np.float32)
    valid = np.arange(6) < np.array([[2], [0], [4]])
    poisoned = jnp.where(jnp.asarray(valid)[..., None], texts, jnp.nan)
    sigma = text_sigma(poisoned, jnp.asarray(valid), "real")
    assert sigma == pytest.approx(texts[valid].std(ddof=1), rel=1e-5)
    sigma = text_sigma(poisoned, jnp.asarray(valid), "padded")
    assert sigma == pytest.approx(np.where(valid[..., None], texts, 0)[:, :4].std(ddof=1), rel=1e-5)
    for rows in ("real", "padded"):
        assert text_sigma(poisoned, jnp.zeros((3, 6), bool), rows) == 0


def test_noise_falls_on_the_given_share_of_the_numbers():
    noise = draw_text_noise(jax.random.key(0), (4, 50, 100))
    assert isinstance(noise, TextNoise)
    texts = jnp.zeros((4, 50, 100))
    noisy = np.asarray(noisy_texts(texts, noise, jnp.float32(0.5), 0.9))
    assert (noisy != 0).mean() == pytest.approx(0.9, abs=0.01)
    assert noisy[noisy != 0].std() == pytest.approx(0.5, rel=0.02)
    np.testing.assert_array_equal(noisy_texts(texts, noise, jnp.float32(0.5), 0.0), texts)
