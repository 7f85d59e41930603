"""Text noise, and the two means over tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opendet_jax.losses.naming import (
    TextNoise,
    draw_text_noise,
    naming_loss,
    noisy_texts,
    text_denoising_loss,
    text_sigma,
)


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
