"""From the backbone's three maps to B_feat: four levels of width D, laid out as tokens, with their positions.

Method: docs/method.md#2-backbone-neck-encoder.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from opendet_jax.model.layers import NORM_EPS, NUM_LEVELS, Pyramid, xavier

TEMPERATURE = 20.0
NORM_GROUPS = 32


@struct.dataclass
class Features(Pyramid):
    """B_feat."""

    positions: Float[Array, "B S D"]  # sine embedding of the cell plus its level's embedding, float32


def nearest(mask: Bool[Array, "B H W"], height: int, width: int) -> Bool[Array, "B h w"]:
    """Downsampled by nearest neighbour: cell i of n reads ⌊i · N / n⌋."""
    rows = np.arange(height) * mask.shape[1] // height
    columns = np.arange(width) * mask.shape[2] // width
    return mask[:, rows[:, None], columns]


def valid_ratios(valid: Bool[Array, "B h w"]) -> Float[Array, "B 2"]:
    """(w, h) shares of the padded map that the photograph, which lies in its corner, covers."""
    return jnp.stack([valid[:, 0, :].mean(-1), valid[:, :, 0].mean(-1)], -1)


def sine_embedding(valid: Bool[Array, "B h w"], width: int) -> Float[Array, "B h w D"]:
    """y, then x: each D/2 numbers sin, cos, sin, cos, … of the position in (0, 2π] at falling frequencies.

    A position is the count of valid cells up to and including the cell, over the count of its whole column (y) or row.
    """

    def embed(axis: int) -> Float[Array, "B h w D2"]:
        count = jnp.cumsum(valid, axis, dtype=jnp.float32)
        total = jax.lax.slice_in_dim(count, count.shape[axis] - 1, None, axis=axis)
        position = count / (total + 1e-6) * (2 * np.pi)
        pairs = width // 4
        frequency = (TEMPERATURE ** -(np.arange(pairs) / pairs)).astype(np.float32)
        angle = position[..., None] * frequency
        return jnp.stack([jnp.sin(angle), jnp.cos(angle)], -1).reshape(*valid.shape, 2 * pairs)

    return jnp.concatenate([embed(1), embed(2)], -1)


class Neck(nn.Module):
    """1×1 convolutions of three maps, a 3×3 of stride 2 on the last one for a fourth; GroupNorm on each."""

    width: int  # D, a multiple of 32
    dtype: DTypeLike = jnp.float32

    def setup(self):
        self.projections = [
            nn.Conv(self.width, (1, 1), dtype=self.dtype, kernel_init=xavier) for _ in range(NUM_LEVELS - 1)
        ] + [nn.Conv(self.width, (3, 3), 2, padding=1, dtype=self.dtype, kernel_init=xavier)]
        self.norms = [nn.GroupNorm(NORM_GROUPS, epsilon=NORM_EPS, use_fast_variance=False) for _ in range(NUM_LEVELS)]
        self.level_embed = self.param("level_embed", nn.initializers.normal(1.0), (NUM_LEVELS, self.width))

    def __call__(self, maps: Sequence[Float[Array, "B _ _ _"]], pixel_mask: Bool[Array, "B H W"]) -> Features:
        """`maps` of strides 8, 16 and 32; `pixel_mask` True on the photograph."""
        tokens, valid, ratios, positions, shapes = [], [], [], [], []
        for level, source in enumerate([*maps, maps[-1]]):
            # GroupNorm counts padded cells too, as the authors' does; what they hold does not depend on hidden pixels.
            x = self.norms[level](self.projections[level](source).astype(jnp.float32))
            batch, height, width, _ = x.shape
            here = nearest(pixel_mask, height, width)
            position = sine_embedding(here, self.width) + self.level_embed[level]
            tokens.append(x.reshape(batch, -1, self.width).astype(self.dtype))
            valid.append(here.reshape(batch, -1))
            ratios.append(valid_ratios(here))
            positions.append(position.reshape(batch, -1, self.width))
            shapes.append((height, width))
        return Features(
            tokens=jnp.concatenate(tokens, 1),
            valid=jnp.concatenate(valid, 1),
            valid_ratios=jnp.stack(ratios, 1),
            level_shapes=tuple(shapes),
            positions=jnp.concatenate(positions, 1),
        )
