"""L1 and GIoU losses of the matched boxes, and the focal binary cross-entropy of objectness and alignment scores.

Method: docs/method.md#9-masked-alignment-loss, docs/method.md#10-joint-loss,
docs/method.md#11-total-loss-and-optimizer.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from opendet_jax.ops.boxes import giou, to_corners

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


def l1_loss(
    boxes: Float[Array, "B Q 4"],
    targets: Float[Array, "B Q 4"],
    matched: Bool[Array, "B Q"],
    normaliser: Float[Array, ""],
) -> Float[Array, ""]:
    """Σ over matched queries of ‖b − target‖₁, normalised."""
    return jnp.where(matched, jnp.abs(boxes - targets).sum(-1), 0.0).sum() / normaliser


def giou_loss(
    boxes: Float[Array, "B Q 4"],
    targets: Float[Array, "B Q 4"],
    matched: Bool[Array, "B Q"],
    normaliser: Float[Array, ""],
) -> Float[Array, ""]:
    """Σ over matched queries of 1 − GIoU(b, target), normalised."""
    distance = 1.0 - giou(to_corners(boxes), to_corners(targets))
    return jnp.where(matched, distance, 0.0).sum() / normaliser
