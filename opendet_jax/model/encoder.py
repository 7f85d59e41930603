"""E_feat: B_feat after layers of deformable self-attention over all levels.

Method: docs/method.md#2-backbone-neck-encoder.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Float

from opendet_jax.config import ModelConfig
from opendet_jax.model.layers import (
    NUM_LEVELS,
    DeformableAttention,
    FeedForward,
    LayerNorm,
    Pyramid,
    recomputed,
    reference_per_level,
    remat_policy,
)
from opendet_jax.model.neck import Features


@struct.dataclass
class Memory(Pyramid):
    """E_feat."""


def cell_centres(
    level_shapes: tuple[tuple[int, int], ...], valid_ratios: Float[Array, "B L 2"]
) -> Float[Array, "B S 2"]:
    """(x, y) of every token's centre, normalised by the photograph's size (above 1 on padding)."""
    centres = []
    for level, (height, width) in enumerate(level_shapes):
        y, x = np.divmod(np.arange(height * width), width)
        grid = np.stack([(x + 0.5) / width, (y + 0.5) / height], -1).astype(np.float32)
        centres.append(grid / valid_ratios[:, level, None])
    return jnp.concatenate(centres, 1)


class EncoderLayer(nn.Module):
    config: ModelConfig

    def setup(self):
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        self.self_attn = DeformableAttention(config.width, config.num_heads, NUM_LEVELS, config.num_points, dtype)
        self.norm1 = LayerNorm(dtype)
        self.ffn = FeedForward(config.width, config.ffn_width, dtype=dtype)
        self.norm2 = LayerNorm(dtype)

    def __call__(
        self, x: Float[Array, "B S D"], features: Features, reference: Float[Array, "B S L 2"]
    ) -> Float[Array, "B S D"]:
        query = x + features.positions.astype(x.dtype)
        x = self.norm1(x + self.self_attn(query, reference, dataclasses.replace(features, tokens=x)))
        return self.norm2(x + self.ffn(x))


class Encoder(nn.Module):
    config: ModelConfig

    def setup(self):
        layer = recomputed(EncoderLayer, remat_policy(self.config))
        self.layers = [layer(self.config) for _ in range(self.config.encoder_layers)]

    def __call__(self, features: Features) -> Memory:
        centres = cell_centres(features.level_shapes, features.valid_ratios)
        reference = reference_per_level(centres, features.valid_ratios)
        x = features.tokens
        for layer in self.layers:
            x = layer(x, features, reference)
        return Memory(x, features.valid, features.valid_ratios, features.level_shapes)
