"""Boxes: (cx, cy, w, h) ↔ (x0, y0, x1, y1), overlap, the clamped logit of box coordinates, and suppression.

Method: docs/method.md#conventions.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

OVERLAP_EPS = 1e-6  # docs/method.md#conventions: added to the denominators of IoU and GIoU
LOGIT_EPS = 1e-3


def to_corners(boxes: Float[Array, "*n 4"]) -> Float[Array, "*n 4"]:
    """(cx, cy, w, h) → (x0, y0, x1, y1)."""
    centre, size = jnp.split(boxes, 2, axis=-1)
    return jnp.concatenate([centre - size / 2, centre + size / 2], axis=-1)


def to_centres(corners: Float[Array, "*n 4"]) -> Float[Array, "*n 4"]:
    """(x0, y0, x1, y1) → (cx, cy, w, h)."""
    low, high = jnp.split(corners, 2, axis=-1)
    return jnp.concatenate([(low + high) / 2, high - low], axis=-1)


def logit(x: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Inverse sigmoid, log(max(x, 1e-3) / max(1 − x, 1e-3)) with x first clipped to [0, 1]: finite everywhere."""
    x = jnp.clip(x, 0.0, 1.0)
    return jnp.log(jnp.maximum(x, LOGIT_EPS) / jnp.maximum(1.0 - x, LOGIT_EPS))


def _intersection_and_union(
    a: Float[Array, "*n 4"], b: Float[Array, "*n 4"]
) -> tuple[Float[Array, "*n"], Float[Array, "*n"]]:
    overlap = jnp.clip(jnp.minimum(a[..., 2:], b[..., 2:]) - jnp.maximum(a[..., :2], b[..., :2]), 0.0)
    intersection = overlap[..., 0] * overlap[..., 1]
    area_a = (a[..., 2] - a[..., 0]) * (a[..., 3] - a[..., 1])
    area_b = (b[..., 2] - b[..., 0]) * (b[..., 3] - b[..., 1])
    return intersection, area_a + area_b - intersection


def iou(a: Float[Array, "*#n 4"], b: Float[Array, "*#n 4"], eps: float = OVERLAP_EPS) -> Float[Array, "*n"]:
    """Intersection over union of corner boxes, broadcasting.

    With eps = 0 (the rule of docs/method.md#9-masked-alignment-loss) two empty boxes have IoU 0.
    """
    intersection, union = _intersection_and_union(*jnp.broadcast_arrays(a, b))
    if eps:
        return intersection / (union + eps)
    return jnp.where(union > 0, intersection / jnp.where(union > 0, union, 1.0), 0.0)


def giou(a: Float[Array, "*#n 4"], b: Float[Array, "*#n 4"]) -> Float[Array, "*n"]:
    """Generalised IoU of corner boxes, broadcasting: IoU − (hull − union) / hull, denominators + 1e-6."""
    a, b = jnp.broadcast_arrays(a, b)
    intersection, union = _intersection_and_union(a, b)
    hull_size = jnp.clip(jnp.maximum(a[..., 2:], b[..., 2:]) - jnp.minimum(a[..., :2], b[..., :2]), 0.0)
    hull = hull_size[..., 0] * hull_size[..., 1]
    return intersection / (union + OVERLAP_EPS) - (hull - union) / (hull + OVERLAP_EPS)


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
