"""The distillation loss (Eq. 7): prompts point where the text embeddings of their objects point.

Method: docs/method.md#6-prompts-distiller.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

SQUARED_NORM_EPS = 1e-12


def cosine(a: Float[Array, "*n E"], b: Float[Array, "*n E"]) -> Float[Array, "*n"]:
    """Cosine similarity; 0, with finite gradients, where one of the two is zero."""
    squares = jnp.maximum((a * a).sum(-1), SQUARED_NORM_EPS) * jnp.maximum((b * b).sum(-1), SQUARED_NORM_EPS)
    return (a * b).sum(-1) / jnp.sqrt(squares)


def distillation_loss(
    prompts: Float[Array, "B Q E"], texts: Float[Array, "B G E"], matched_object: Int[Array, "B Q"]
) -> Float[Array, ""]:
    """1 − cos(P_i, T_e,j): mean over the pairs of an image, then over the images that have pairs.

    All groups of denoising queries of an image hold equally many pairs, so the mean over groups and images is this one.
    `matched_object` is −1 for queries without an object.
    """
    matched = matched_object >= 0
    targets = jnp.take_along_axis(texts, jnp.maximum(matched_object, 0)[..., None], axis=1)
    prompts = jnp.where(matched[..., None], prompts, 1.0)  # nothing of the others, not even a NaN
    distance = jnp.where(matched, 1.0 - cosine(prompts, targets), 0.0).sum(-1)
    pairs = matched.sum(-1)
    return (distance / jnp.maximum(pairs, 1)).sum() / jnp.maximum((pairs > 0).sum(), 1)
