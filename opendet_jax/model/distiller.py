"""Vision-to-language distillation, VLD-M (paper section 3.4): queries → VL-prompts.

Method: docs/method.md#6-prompts-distiller.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from opendet_jax.config import ModelConfig
from opendet_jax.model.layers import (
    NUM_LEVELS,
    DeformableAttention,
    FeedForward,
    LayerNorm,
    Pyramid,
    reference_per_level,
)


@struct.dataclass
class Prompts:
    """One VL-prompt P a query, in the text-embedding space. The two differ only by dropout."""

    distilled: Float[Array, "*A B K E"]  # for the distillation loss
    language: Float[Array, "*A B K E"]  # for the language model: with dropout before the fusion


class DistillerBlock(nn.Module):
    """Deformable cross-attention to a pyramid at the queries' boxes → add & norm → FFN → add & norm."""

    config: ModelConfig

    def setup(self):
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        width = config.width
        self.cross_attn = DeformableAttention(width, config.num_heads, NUM_LEVELS, config.distiller_points, dtype)
        self.norm_ca = LayerNorm(dtype=dtype)
        self.ffn = FeedForward(width, config.ffn_width, config.distiller_dropout, dtype)
        self.norm3 = LayerNorm(dtype=dtype)

    def __call__(
        self, hidden: Float[Array, "B K D"], boxes: Float[Array, "B K 4"], source: Pyramid, deterministic: bool
    ) -> Float[Array, "B K D"]:
        reference = reference_per_level(boxes, source.valid_ratios)
        x = self.norm_ca(hidden + self.cross_attn(hidden, reference, source))
        return self.norm3(x + self.ffn(x, deterministic=deterministic))


class Projection(nn.Module):
    """φ: D → E, three layers with ReLU6 beside a gated skip (W₁x) ⊙ σ(W₂x)."""

    config: ModelConfig

    def setup(self):
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        widths = (config.distiller_hidden, config.distiller_hidden, config.text_width)
        self.layers = [nn.Dense(width, dtype=dtype) for width in widths]
        self.linear = nn.Dense(config.text_width, use_bias=False, dtype=dtype)
        self.linear_gating = nn.Dense(config.text_width, use_bias=False, dtype=dtype)
        self.dropout = nn.Dropout(config.distiller_dropout)

    def __call__(self, x: Float[Array, "*n D"], deterministic: bool) -> Float[Array, "*n E"]:
        y = x
        for number, layer in enumerate(self.layers):
            y = layer(y)
            y = nn.relu6(y) if number < len(self.layers) - 1 else y
            y = self.dropout(y, deterministic=deterministic)
        return y + self.linear(x) * nn.sigmoid(self.linear_gating(x))


class Distiller(nn.Module):
    """P = W_f [φ(h), φ_B(h_B), φ_E(h_E)]: h_B and h_E are the queries after a look at B_feat and at E_feat."""

    config: ModelConfig

    def setup(self):
        config = self.config
        self.backbone_blocks = [DistillerBlock(config) for _ in range(config.distiller_blocks)]
        self.encoder_blocks = [DistillerBlock(config) for _ in range(config.distiller_blocks)]
        self.phi, self.phi_backbone, self.phi_encoder = (Projection(config) for _ in range(3))
        self.fusion = nn.Dense(config.text_width, use_bias=False, dtype=jnp.dtype(config.dtype))
        self.dropout = nn.Dropout(config.prompt_dropout)

    def __call__(
        self,
        hidden: Float[Array, "B K D"],
        boxes: Float[Array, "B K 4"],
        features: Pyramid,
        memory: Pyramid,
        deterministic: bool = True,
    ) -> Prompts:
        """hidden: h_l of a layer; boxes: its predicted boxes, whose gradient is kept."""
        # the branches teach themselves, B_feat and E_feat, but not the decoder
        h_backbone = h_encoder = jax.lax.stop_gradient(hidden)
        for block in self.backbone_blocks:
            h_backbone = block(h_backbone, boxes, features, deterministic=deterministic)
        for block in self.encoder_blocks:
            h_encoder = block(h_encoder, boxes, memory, deterministic=deterministic)
        parts = (
            self.phi(hidden, deterministic),
            self.phi_backbone(h_backbone, deterministic),
            self.phi_encoder(h_encoder, deterministic),
        )
        dropped = [self.dropout(part, deterministic=deterministic) for part in parts]
        distilled = self.fusion(jnp.concatenate(parts, axis=-1))
        language = distilled if deterministic else self.fusion(jnp.concatenate(dropped, axis=-1))
        return Prompts(distilled=distilled, language=language)


class DirectPrompts(nn.Module):
    """The ablation without VLD-M: queries projected straight into the language model's space, as in GenerateU."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        hidden: Float[Array, "B K D"],
        boxes: Float[Array, "B K 4"],
        features: Pyramid,
        memory: Pyramid,
        deterministic: bool = True,
    ) -> Prompts:
        prompts = nn.Dense(self.config.text_width, dtype=jnp.dtype(self.config.dtype), name="projection")(hidden)
        return Prompts(distilled=prompts, language=prompts)
