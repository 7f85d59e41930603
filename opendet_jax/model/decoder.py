"""The decoder, one-to-many and one-to-one decoupled (paper section 3.2).

The first layers learn from several queries an object and have no self-attention; the last ones learn from one query an
object and have two. Gradients of the content do not cross from the second group to the first.

Method: docs/method.md#4-decoder.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from opendet_jax.config import Ablation, ModelConfig
from opendet_jax.model.layers import (
    MLP,
    NUM_LEVELS,
    DeformableAttention,
    FeedForward,
    LayerNorm,
    Pyramid,
    recomputed,
    reference_per_level,
    remat_policy,
    xavier,
)
from opendet_jax.model.query_selection import BinaryHead
from opendet_jax.ops.boxes import logit


@struct.dataclass
class Decoded:
    """What every layer says, first layer first: A layers, K queries (denoising queries first)."""

    hidden: Float[Array, "A B K D"]  # h_l, after the LayerNorm that all layers share
    boxes: Float[Array, "A B K 4"]  # b_l, (cx, cy, w, h) in [0, 1]
    objectness: Float[Array, "A B K"]  # logit of the binary score p


def one_to_many_layers(config: ModelConfig, ablation: Ablation) -> int:
    """How many layers, the first ones, learn one-to-many; 0 in the ablation without decoupling."""
    return config.one_to_many_layers if ablation.object_detector else 0


class SelfAttention(nn.Module):
    """Multi-head attention among queries; no position embedding, float32 softmax."""

    width: int
    num_heads: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B K D"], attention: Bool[Array, "B K K"]) -> Float[Array, "B K D"]:
        batch, queries, _ = x.shape
        head_width = self.width // self.num_heads
        qkv = nn.Dense(3 * self.width, kernel_init=xavier, dtype=self.dtype, name="in_proj")(x)
        q, k, v = jnp.moveaxis(qkv.reshape(batch, queries, 3, self.num_heads, head_width), (2, 3), (0, 1))
        # Heads before the batch, which may be 1: XLA's CPU program divides sums among threads by the first axis.
        scores = jnp.einsum("hbqd,hbkd->hbqk", q * head_width**-0.5, k, preferred_element_type=jnp.float32)
        # the least finite number, not −∞: a row that may look at nothing stays finite
        scores = jnp.where(attention, scores, jnp.finfo(jnp.float32).min)
        weights = nn.softmax(scores, axis=-1).astype(self.dtype)
        out = jnp.einsum("hbqk,hbkd->hbqd", weights, v)
        out = jnp.moveaxis(out, 0, 2).reshape(batch, queries, self.width)
        return nn.Dense(self.width, kernel_init=xavier, dtype=self.dtype, name="out_proj")(out)


class DecoderLayer(nn.Module):
    """Cross-attention to E_feat at the reference boxes, then rounds of self-attention and FFN; post-norm.

    self_attentions: 0 in one-to-many layers, 2 in one-to-one layers, 1 in the ablation without decoupling.
    Names follow the authors' checkpoint.
    """

    config: ModelConfig
    self_attentions: int

    def setup(self):
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        width, heads = config.width, config.num_heads

        self.cross_attn = DeformableAttention(width, heads, NUM_LEVELS, config.num_points, dtype)
        self.norm1 = LayerNorm(dtype=dtype)
        if self.self_attentions > 0:
            self.self_attn = SelfAttention(width, heads, dtype)
            self.norm2 = LayerNorm(dtype=dtype)
        self.ffn = FeedForward(width, config.ffn_width, dtype=dtype)
        self.norm3 = LayerNorm(dtype=dtype)
        if self.self_attentions > 1:
            self.self_attn3 = SelfAttention(width, heads, dtype)
            self.norm5 = LayerNorm(dtype=dtype)
            self.ffn3 = FeedForward(width, config.ffn_width, dtype=dtype)
            self.norm33 = LayerNorm(dtype=dtype)

    def __call__(
        self,
        x: Float[Array, "B K D"],
        reference: Float[Array, "B K 4"],
        memory: Pyramid,
        attention: Bool[Array, "B K K"],
    ) -> Float[Array, "B K D"]:
        reference_levels = reference_per_level(reference, memory.valid_ratios)
        x = self.norm1(x + self.cross_attn(x, reference_levels, memory))
        if self.self_attentions > 0:
            x = self.norm2(x + self.self_attn(x, attention))
        x = self.norm3(x + self.ffn(x))
        if self.self_attentions > 1:
            x = self.norm5(x + self.self_attn3(x, attention))
            x = self.norm33(x + self.ffn3(x))
        return x


class Decoder(nn.Module):
    config: ModelConfig
    ablation: Ablation = Ablation()

    def setup(self):
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        layer = recomputed(DecoderLayer, remat_policy(config))
        layers = config.one_to_many_layers + config.one_to_one_layers
        self.one_to_many = one_to_many_layers(config, self.ablation)
        rounds = 2 if self.ablation.object_detector else 1
        self.layers = [layer(config, rounds * (number >= self.one_to_many)) for number in range(layers)]
        self.norm = LayerNorm(dtype=dtype)

        def box_head():
            return MLP((config.width, config.width, 4), zero_last=True, dtype=dtype)

        self.box_head_one_to_many, self.box_head_one_to_one = box_head(), box_head()
        self.binary_head_one_to_many, self.binary_head_one_to_one = BinaryHead(), BinaryHead()

    def __call__(
        self,
        content: Float[Array, "B K D"],
        boxes: Float[Array, "B K 4"],
        memory: Pyramid,
        attention: Bool[Array, "B K K"],
    ) -> Decoded:
        """content and boxes: of the queries that enter; boxes (r_0) are gradient-stopped here, content is not."""
        stop = jax.lax.stop_gradient
        x, reference = content, stop(boxes)
        layers = []
        for number, layer in enumerate(self.layers):
            one_to_many = number < self.one_to_many
            if 0 < number == self.one_to_many:
                x = stop(x)  # one-to-one losses do not teach one-to-many layers
            x = layer(x, stop(reference), memory, attention)
            h = self.norm(x)
            box_head = self.box_head_one_to_many if one_to_many else self.box_head_one_to_one
            binary_head = self.binary_head_one_to_many if one_to_many else self.binary_head_one_to_one
            d = box_head(h).astype(jnp.float32)
            # look forward twice, one step: b_l reaches d_l and d_{l−1}, r_l only d_l; their values are equal
            predicted = nn.sigmoid(d + logit(reference))
            reference = nn.sigmoid(d + logit(stop(reference)))
            layers.append((h, predicted, binary_head(h)))
        hidden, boxes, objectness = (jnp.stack(values) for values in zip(*layers, strict=True))
        return Decoded(hidden=hidden, boxes=boxes, objectness=objectness)
