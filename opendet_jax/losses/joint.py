"""The Joint Loss (Eq. 4): one target for objectness, box quality and alignment.

Method: docs/method.md#10-joint-loss.
"""

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid, sigmoid
from jaxtyping import Array, Bool, Float

from opendet_jax.losses.detection import ALPHA

LEAST_IOU = 0.01
LEAST_TARGET = 0.1


def joint_target(
    objectness: Float[Array, "*n"], alignment: Float[Array, "*n"], overlap: Float[Array, "*n"]
) -> Float[Array, "*n"]:
    """t = max(0.1, sqrt(p^α · u^(1−2α) · s^α)), without gradient.

    Args:
      objectness: logit of p.
      alignment: logit of s, at the query's own object.
      overlap: IoU u of the query's box and its object's.
    """
    log_overlap = jnp.log(jnp.maximum(overlap, LEAST_IOU))
    log_product = ALPHA * (log_sigmoid(objectness) + log_sigmoid(alignment)) + (1 - 2 * ALPHA) * log_overlap
    return jax.lax.stop_gradient(jnp.maximum(LEAST_TARGET, jnp.exp(log_product / 2)))


def joint_loss(
    objectness: Float[Array, "B Q"],
    alignment: Float[Array, "B Q"],
    overlap: Float[Array, "B Q"],
    matched: Bool[Array, "B Q"],
    valid: Bool[Array, "B Q"],
    normaliser: Float[Array, ""],
) -> Float[Array, ""]:
    """Σ_matched −[(t − p)² log p + (1 − t) p² log(1 − p)] + Σ_unmatched −p² log(1 − p), normalised.

    The weights (t − p)² and p² have gradients, t has none; `alignment` and `overlap` count where `matched`.
    """
    p = sigmoid(objectness)
    negative = p**2 * log_sigmoid(-objectness)
    t = joint_target(objectness, alignment, overlap)
    positive = (t - p) ** 2 * log_sigmoid(objectness) + (1 - t) * negative
    return -jnp.where(valid, jnp.where(matched, positive, negative), 0.0).sum() / normaliser
