"""Threshold-based query selection (Eq. 1): the encoder tokens that look like objects become queries.

A variable number of tokens passes the threshold; the program is static, so Q slots are filled with the best tokens and
`Queries.valid` says which slots are queries.

Method: docs/method.md#3-query-selection.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from opendet_jax.config import ModelConfig
from opendet_jax.model.layers import MLP, LayerNorm, Pyramid, xavier
from opendet_jax.ops.boxes import logit
from opendet_jax.ops.devices import on_each_device

PROPOSAL_SIZE = 0.05  # width and height of a proposal on the finest level; doubles on each next one
PROPOSAL_MARGIN = 0.01  # a proposal with a coordinate outside (margin, 1 − margin) is no proposal


@struct.dataclass
class Queries:
    """The selected tokens, the best first (but see `fill_as_program`). Content and boxes carry gradients."""

    content: Float[Array, "B Q D"]
    boxes: Float[Array, "B Q 4"]  # (cx, cy, w, h) in [0, 1]: the first reference boxes r_0
    objectness: Float[Array, "B Q"]  # logit of the score p
    valid: Bool[Array, "B Q"]  # False: an empty slot, which must influence nothing
    index: Int[Array, "B Q"]  # the encoder token of each slot


class BinaryHead(nn.Module):
    """Object or not: the logit is the mean over D of a Linear D→D. float32."""

    @nn.compact
    def __call__(self, x: Float[Array, "*n D"]) -> Float[Array, "*n"]:
        width = x.shape[-1]
        kernel = self.param("kernel", xavier, (width, width))
        bias = self.param("bias", nn.initializers.zeros, (width,))
        # the mean of a Linear's outputs is one Linear with the mean weights: D times less work, same value
        return x.astype(jnp.float32) @ kernel.mean(axis=1) + bias.mean()


def proposals(memory: Pyramid) -> tuple[Float[Array, "B S 4"], Bool[Array, "B S"]]:
    """One box a token: the centre of its cell relative to the valid region, w = h = 0.05·2^level.

    Returns (cx, cy, w, h) in [0, 1], and which of them are proposals: on the image and inside the margin.
    """
    boxes, start = [], 0
    for level, (height, width) in enumerate(memory.level_shapes):
        valid = memory.valid[:, start : start + height * width].reshape(-1, height, width)
        start += height * width
        rows = jnp.maximum(valid[:, :, 0].sum(axis=1), 1)[:, None, None]
        columns = jnp.maximum(valid[:, 0, :].sum(axis=1), 1)[:, None, None]
        y, x = jnp.meshgrid(jnp.arange(height) + 0.5, jnp.arange(width) + 0.5, indexing="ij")
        size = jnp.full_like(valid, PROPOSAL_SIZE * 2**level, dtype=jnp.float32)
        level_boxes = jnp.stack([x / columns, y / rows, size, size], axis=-1)
        boxes.append(level_boxes.reshape(-1, height * width, 4))
    boxes = jnp.concatenate(boxes, axis=1)
    inside = ((boxes > PROPOSAL_MARGIN) & (boxes < 1 - PROPOSAL_MARGIN)).all(axis=-1)
    return boxes, inside & memory.valid


def select_best(
    logits: Float[Array, "B S"], eligible: Bool[Array, "B S"], slots: int, threshold: float, minimum: int
) -> tuple[Int[Array, "B Q"], Bool[Array, "B Q"]]:
    """Eq. 1: the eligible tokens with σ(logit) ≥ threshold, best first, at most `slots` (= Q ≤ S).

    An image where none qualifies takes its `minimum` best eligible tokens. Returns token indices and validity.
    """
    # Each device its own images: left to XLA, every one gathers and sorts the scores of all.
    logits, index = on_each_device(partial(jax.lax.top_k, k=slots), jnp.where(eligible, logits, -jnp.inf))
    qualified = nn.sigmoid(logits) >= threshold
    best = jnp.arange(slots) < minimum
    valid = jnp.where(qualified.any(axis=1, keepdims=True), qualified, best)
    return index, valid & (logits > -jnp.inf)


def fill_as_program(
    logits: Float[Array, "B S"], slots: int, threshold: float, minimum: int
) -> tuple[Int[Array, "B Q"], Bool[Array, "B Q"]]:
    """As the authors' program selects, where an image's rows depend on its batch: docs/method.md#12-paper-and-program.

    Every image gets max(minimum, the batch's largest count) tokens, at most `slots`: those that pass in raster order
    (by score where more than `slots` pass), then its lowest-scoring ones. Nothing passes anywhere: the best.
    """
    tokens = logits.shape[1]
    qualified = nn.sigmoid(logits) >= threshold
    count = qualified.sum(axis=1, keepdims=True)
    # among those that pass the key is the place, among the others the score
    key = jnp.where(qualified, jnp.arange(tokens, dtype=logits.dtype), logits)
    filled = on_each_device(lambda *keys: jnp.lexsort(keys, axis=1)[:, :slots], key, ~qualified)
    _, best = on_each_device(partial(jax.lax.top_k, k=slots), logits)
    index = jnp.where((count > slots) | (count.max() == 0), best, filled)
    size = jnp.minimum(jnp.maximum(count.max(), minimum), slots)
    return index, jnp.broadcast_to(jnp.arange(slots) < size, index.shape)


class QuerySelection(nn.Module):
    """Scores every encoder token and keeps the objects. Q = min(config.max_queries, S).

    `fixed` is the ablation without the threshold: always the config.min_queries best.
    """

    config: ModelConfig
    fixed: bool = False

    @nn.compact
    def __call__(self, memory: Pyramid) -> Queries:
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        proposal, eligible = proposals(memory)
        tokens = jnp.where(eligible[..., None], memory.tokens, 0)
        features = nn.Dense(config.width, kernel_init=xavier, dtype=dtype, name="enc_output")(tokens)
        features = LayerNorm(dtype=dtype, name="enc_output_norm")(features)
        logits = BinaryHead(name="score")(features)

        scores = jax.lax.stop_gradient(logits)
        slots = min(config.min_queries if self.fixed else config.max_queries, logits.shape[1])
        if config.query_fill == "program" and not self.fixed:
            index, valid = fill_as_program(scores, slots, config.score_threshold, config.min_queries)
        else:
            threshold = 0.0 if self.fixed else config.score_threshold
            index, valid = select_best(scores, eligible, slots, threshold, config.min_queries)

        content = jnp.take_along_axis(features, index[..., None], axis=1)
        proposal = jnp.take_along_axis(proposal, index[..., None], axis=1)
        box_head = MLP((config.width, config.width, 4), zero_last=True, dtype=dtype, name="box_head")
        boxes = nn.sigmoid(box_head(content).astype(jnp.float32) + logit(proposal))
        # only the program selects tokens without a proposal; their box is the whole (1, 1, 1, 1)
        boxes = jnp.where(jnp.take_along_axis(eligible, index, axis=1)[..., None], boxes, 1.0)
        return Queries(
            content=content,
            boxes=boxes,
            objectness=jnp.take_along_axis(logits, index, axis=1),
            valid=valid,
            index=index,
        )
