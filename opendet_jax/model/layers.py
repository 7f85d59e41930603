"""What several parts are made of: the feature pyramid as tokens, LayerNorm, MLP, feed-forward and the
deformable-attention module; and layers that are computed again in the backward pass.

Activations have a module's `dtype`; parameters are float32, and so is what decides where and how much is read
(normalisation, softmax, sampling locations).

Method: docs/method.md#conventions, docs/method.md#2-backbone-neck-encoder.
"""

from collections.abc import Sequence
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from opendet_jax.config import ModelConfig
from opendet_jax.ops.deformable_attention import deformable_attention

NUM_LEVELS = 4  # L: strides 8, 16, 32 and 64
Remat = Literal["no", "nothing", "products"]  # whether layers are computed again, and what of them is kept
NORM_EPS = 1e-5  # LayerNorm and GroupNorm everywhere (docs/method.md#conventions)
xavier = nn.initializers.xavier_uniform()


@struct.dataclass
class Pyramid:
    """Level 0 (the finest) first, each level row by row. Tokens that are not `valid` influence no valid one."""

    tokens: Float[Array, "B S D"]
    valid: Bool[Array, "B S"]  # True where the cell lies on the photograph
    valid_ratios: Float[Array, "B L 2"]  # (w, h): the photograph's share of each padded level
    level_shapes: tuple[tuple[int, int], ...] = struct.field(pytree_node=False)  # (h, w) of each level


def remat_policy(config: ModelConfig) -> Remat:
    return config.remat_keeps if config.remat else "no"


def recomputed(layer: type[nn.Module], remat: Remat, static_argnums: tuple[int, ...] = ()) -> type[nn.Module]:
    """`layer`, of which the backward pass has its input and, with "products", the results of its matrix products.

    `static_argnums`: of its call, the module being number 0.
    """
    if remat == "no":
        return layer
    policy = jax.checkpoint_policies.dots_saveable if remat == "products" else None
    return nn.remat(layer, policy=policy, static_argnums=static_argnums)


class LayerNorm(nn.Module):
    """Over the last axis, computed in float32, returned in `dtype`.

    As rows: XLA's CPU program hardly divides sums among threads where the first axis, the batch, is 1.
    """

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*n D"]) -> Float[Array, "*n D"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
        rows = rows - rows.mean(-1, keepdims=True)
        rows = rows * jax.lax.rsqrt(jnp.square(rows).mean(-1, keepdims=True) + NORM_EPS)
        return (rows * scale + bias).astype(self.dtype).reshape(x.shape)


class MLP(nn.Module):
    """Dense layers of the given widths with ReLU between. `zero_last`: the last starts at zero (box heads)."""

    widths: Sequence[int]
    zero_last: bool = False
    dtype: DTypeLike = jnp.float32

    def setup(self):
        last = nn.initializers.zeros if self.zero_last else xavier
        inits = [xavier] * (len(self.widths) - 1) + [last]
        self.layers = [
            nn.Dense(width, dtype=self.dtype, kernel_init=init) for width, init in zip(self.widths, inits, strict=True)
        ]

    def __call__(self, x: Float[Array, "*n C"]) -> Float[Array, "*n K"]:
        for layer in self.layers[:-1]:
            x = nn.relu(layer(x))
        return self.layers[-1](x)


class FeedForward(nn.Module):
    """linear1 → ReLU → dropout → linear2 → dropout. The residual and its LayerNorm belong to the caller."""

    width: int
    hidden: int
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*n D"], deterministic: bool = True) -> Float[Array, "*n D"]:
        x = nn.relu(nn.Dense(self.hidden, dtype=self.dtype, kernel_init=xavier, name="linear1")(x))
        x = nn.Dropout(self.dropout)(x, deterministic=deterministic)
        x = nn.Dense(self.width, dtype=self.dtype, kernel_init=xavier, name="linear2")(x)
        return nn.Dropout(self.dropout)(x, deterministic=deterministic)


def reference_per_level(
    reference: Float[Array, "B Q C"], valid_ratios: Float[Array, "B L 2"]
) -> Float[Array, "B Q L C"]:
    """Points (C = 2) or boxes (C = 4), normalised by the photograph's size → by the padded size of each level."""
    ratios = jnp.tile(valid_ratios, reference.shape[-1] // 2)
    return reference[:, :, None] * ratios[:, None]


def offset_ring(num_heads: int, num_levels: int, num_points: int) -> np.ndarray:
    """First offsets, [H·L·P·2]: head i looks along angle 2πi/H on a square, its point p at distance p + 1."""
    angle = np.arange(num_heads) * 2 * np.pi / num_heads
    direction = np.stack([np.cos(angle), np.sin(angle)], -1)
    direction /= np.abs(direction).max(-1, keepdims=True)
    distance = np.arange(1, num_points + 1)[:, None]
    ring = np.broadcast_to(direction[:, None, None] * distance, (num_heads, num_levels, num_points, 2))
    return ring.reshape(-1).astype(np.float32)


class DeformableAttention(nn.Module):
    """Multi-scale deformable attention of queries to a pyramid (docs/method.md#2-backbone-neck-encoder).

    Each query looks around a reference point r (location = r + Δ / (w_l, h_l)) or a reference box
    (location = centre + Δ / points · size / 2), given per level: see `reference_per_level`.
    """

    width: int  # D
    num_heads: int
    num_levels: int
    num_points: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, query: Float[Array, "B Q D"], reference: Float[Array, "B Q L C"], source: Pyramid
    ) -> Float[Array, "B Q D"]:
        batch, queries, _ = query.shape
        per_head = (self.num_heads, self.num_levels, self.num_points)
        count = int(np.prod(per_head))

        value = nn.Dense(self.width, dtype=self.dtype, kernel_init=xavier, name="value_proj")(source.tokens)
        value = jnp.where(source.valid[..., None], value, 0).reshape(
            *value.shape[:2], self.num_heads, self.width // self.num_heads
        )

        query = query.astype(jnp.float32)
        ring = offset_ring(*per_head)
        offsets = nn.Dense(
            count * 2,
            kernel_init=nn.initializers.zeros,
            bias_init=lambda key, shape, dtype: jnp.asarray(ring, dtype),
            name="sampling_offsets",
        )(query).reshape(batch, queries, *per_head, 2)
        weights = nn.Dense(count, kernel_init=nn.initializers.zeros, name="attention_weights")(query)
        weights = nn.softmax(weights.reshape(batch * queries, self.num_heads, -1)).reshape(batch, queries, *per_head)

        centre = reference[:, :, None, :, None, :2]
        if reference.shape[-1] == 2:
            unit = 1.0 / jnp.array([(w, h) for h, w in source.level_shapes], jnp.float32)[:, None]
        else:
            unit = reference[:, :, None, :, None, 2:] * (0.5 / self.num_points)
        out = deformable_attention(value, source.level_shapes, centre + offsets * unit, weights)
        return nn.Dense(self.width, dtype=self.dtype, kernel_init=xavier, name="output_proj")(out)
