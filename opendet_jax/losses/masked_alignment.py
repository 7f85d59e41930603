"""The Masked Alignment Loss (Eq. 3): every text of a matched object's category is a positive.

Method: docs/method.md#9-masked-alignment-loss.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from opendet_jax.losses.detection import focal_cross_entropy
from opendet_jax.ops.boxes import iou, to_corners

LEAST_IOU = 0.05


def same_name(texts: Float[Array, "B G E"], valid: Bool[Array, "B G"], threshold: float) -> Bool[Array, "B G G"]:
    """M = 1[T_e T_eᵀ ≥ threshold] among the real objects of an image."""
    similarity = jnp.einsum("bge,bhe->bgh", texts, texts, precision=jax.lax.Precision.HIGHEST)
    return (similarity >= threshold) & valid[:, :, None] & valid[:, None, :]


def own_name(valid: Bool[Array, "B G"]) -> Bool[Array, "B G G"]:
    """The identity in place of M (ablation): the matched text alone is a positive."""
    return jnp.eye(valid.shape[-1], dtype=bool) & valid[:, :, None]


def overlapping(boxes: Float[Array, "B Q 4"], object_boxes: Float[Array, "B G 4"]) -> Bool[Array, "B Q G"]:
    """Pairs that count in one-to-one sets: IoU ≥ 0.05, without an epsilon."""
    overlap = iou(to_corners(boxes)[:, :, None], to_corners(object_boxes)[:, None], eps=0.0)
    return overlap >= LEAST_IOU


def masked_alignment_loss(
    alignment: Float[Array, "B Q G"],
    matched_object: Int[Array, "B Q"],
    mask: Bool[Array, "B G G"],
    counted: Bool[Array, "B Q G"],
) -> Float[Array, ""]:
    """Focal loss between σ(S) and Y = onehot(matching)·M over the counted pairs, divided by ΣY of the batch.

    Args:
      alignment: S, logits.
      matched_object: the object of each query, −1 for none.
      mask: M.
      counted: pairs of a real query and a real object that no rule leaves out.
    """
    rows = jnp.take_along_axis(mask, jnp.maximum(matched_object, 0)[..., None], axis=1)
    labels = rows & (matched_object >= 0)[..., None] & counted
    total = jnp.where(counted, focal_cross_entropy(alignment, labels), 0.0).sum()
    return total / jnp.maximum(labels.sum(), 1)
