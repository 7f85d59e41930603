"""Losses of the Object Name Generator: naming matched queries, and text denoising (paper section 3.5).

Method: docs/method.md#7-object-name-generator.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

PADDING = 0


@struct.dataclass
class TextNoise:
    """The random numbers of text denoising."""

    normal: Float[Array, "B G E"]
    uniform: Float[Array, "B G E"]  # in [0, 1)


def draw_text_noise(key: PRNGKeyArray, shape: tuple[int, ...]) -> TextNoise:
    """Numbers for texts of shape (B, G, E)."""
    normal_key, uniform_key = jax.random.split(key)
    return TextNoise(normal=jax.random.normal(normal_key, shape), uniform=jax.random.uniform(uniform_key, shape))


def text_sigma(
    texts: Float[Array, "B G E"], valid: Bool[Array, "B G"], rows: Literal["real", "padded"]
) -> Float[Array, ""]:
    """Unbiased standard deviation of all numbers of the real texts of the batch (one number).

    With "padded" each image also counts zero rows up to the batch's largest number of objects, as the authors'
    program does.
    """
    texts = jnp.where(valid[..., None], texts, 0.0)
    real_rows = valid.sum()
    all_rows = valid.sum(1).max() * valid.shape[0] if rows == "padded" else real_rows
    count = all_rows * texts.shape[-1]
    mean = texts.sum() / jnp.maximum(count, 1)
    squares = jnp.where(valid[..., None], (texts - mean) ** 2, 0.0).sum()
    squares += (all_rows - real_rows) * texts.shape[-1] * mean**2
    return jnp.sqrt(squares / jnp.maximum(count - 1, 1))


def noisy_texts(
    texts: Float[Array, "B G E"], noise: TextNoise, sigma: Float[Array, ""], probability: float
) -> Float[Array, "B G E"]:
    """T_e + N(0, σ²), each number disturbed with the given probability."""
    return texts + jnp.where(noise.uniform < probability, sigma * noise.normal, 0.0)


def naming_loss(
    token_losses: Float[Array, "B R T"], tokens: Int[Array, "B R T"], real: Bool[Array, "B R"]
) -> Float[Array, ""]:
    """One mean over all real tokens of the real rows of the batch."""
    counted = real[..., None] & (tokens != PADDING)
    return jnp.where(counted, token_losses, 0.0).sum() / jnp.maximum(counted.sum(), 1)


def text_denoising_loss(
    token_losses: Float[Array, "B R T"], tokens: Int[Array, "B R T"], real: Bool[Array, "B R"]
) -> Float[Array, ""]:
    """Mean over the real tokens of an image, then over the images that have objects."""
    counted = real[..., None] & (tokens != PADDING)
    count = counted.sum((1, 2))
    means = jnp.where(counted, token_losses, 0.0).sum((1, 2)) / jnp.maximum(count, 1)
    return means.sum() / jnp.maximum((count > 0).sum(), 1)
