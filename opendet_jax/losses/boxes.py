"""L1 and GIoU losses of the matched boxes."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from opendet_jax.ops.boxes import giou, to_corners


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
