"""Greedy non-maximum suppression, class-agnostic, at a static size."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from opendet_jax.ops.boxes import iou


def nms(
    boxes: Float[Array, "Q 4"],
    scores: Float[Array, "Q"],
    valid: Bool[Array, "Q"],
    iou_threshold: float | Float[Array, ""],
) -> Bool[Array, "Q"]:
    """True where a box (corners) is kept: no kept box of higher score overlaps it by more than the threshold.

    Of equal scores the earlier box goes first. Boxes that are not valid neither stay nor suppress.
    """
    order = jnp.argsort(jnp.where(valid, -scores, jnp.inf), stable=True)
    ranked = boxes[order]
    overlaps = iou(ranked[:, None], ranked[None, :], eps=0.0) > iou_threshold
    later = jnp.arange(len(boxes))

    def suppress(i, keep):
        return keep & ~(keep[i] & overlaps[i] & (later > i))

    keep = lax.fori_loop(0, len(boxes), suppress, valid[order])
    return jnp.zeros_like(valid).at[order].set(keep)
