"""The focal binary cross-entropy, for the alignment scores and the objectness."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

ALPHA = 0.25  # of every focal loss and of the joint loss; the matching cost has its own


def focal_cross_entropy(logits: Float[Array, "*n"], labels: Bool[Array, "*n"]) -> Float[Array, "*n"]:
    """−α_t (1 − p_t)² log p_t with γ = 2; finite, with finite gradients, for any finite logit."""
    signed = jnp.where(labels, logits, -logits)  # p_t = σ(signed)
    weight = jnp.where(labels, ALPHA, 1.0 - ALPHA)
    return -weight * jax.nn.sigmoid(-signed) ** 2 * jax.nn.log_sigmoid(signed)


def objectness_focal_loss(
    objectness: Float[Array, "B Q"],
    matched: Bool[Array, "B Q"],
    valid: Bool[Array, "B Q"],
    normaliser: Float[Array, ""],
) -> Float[Array, ""]:
    """Focal loss of the binary logit: matched queries are positive, the other valid ones negative."""
    return jnp.where(valid, focal_cross_entropy(objectness, matched), 0.0).sum() / normaliser
