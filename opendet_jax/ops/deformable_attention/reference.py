"""The oracle: deformable attention as its definition reads, slow, differentiated by autodiff. And what all forms of the
operation share: how levels lie in the sequence of tokens.

Method: docs/method.md#2-backbone-neck-encoder.
"""

from itertools import accumulate

import jax.numpy as jnp
from jaxtyping import Array, Float

LevelShapes = tuple[tuple[int, int], ...]  # (h, w) of each level, static


def level_starts(level_shapes: LevelShapes) -> tuple[int, ...]:
    """First token of each level: levels follow each other, each row by row."""
    return tuple(accumulate((h * w for h, w in level_shapes[:-1]), initial=0))


def sample(feature: Float[Array, "B h w H d"], points: Float[Array, "B Q H P 2"]) -> Float[Array, "B Q H P d"]:
    """Bilinear reading of one level at (x, y) in [0, 1]; half-pixel centres, zero outside the map."""
    _, height, width, _, _ = feature.shape
    x = points[..., 0] * width - 0.5
    y = points[..., 1] * height - 0.5
    batch = jnp.arange(feature.shape[0])[:, None, None, None]
    head = jnp.arange(feature.shape[3])[None, None, :, None]
    total = 0.0
    for dy in (0, 1):
        for dx in (0, 1):
            column, row = jnp.floor(x) + dx, jnp.floor(y) + dy
            share = (1 - jnp.abs(x - column)) * (1 - jnp.abs(y - row))
            inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
            column = jnp.clip(column, 0, width - 1).astype(int)
            row = jnp.clip(row, 0, height - 1).astype(int)
            total += jnp.where(inside, share, 0.0)[..., None] * feature[batch, row, column, head]
    return jnp.asarray(total)


def deformable_attention(
    value: Float[Array, "B S H d"],
    level_shapes: tuple[tuple[int, int], ...],
    locations: Float[Array, "B Q H L P 2"],
    weights: Float[Array, "B Q H L P"],
) -> Float[Array, "B Q Hd"]:
    """Σ over levels and points of weight · value(location); arguments as of the package's `deformable_attention`."""
    batch, _, heads, width = value.shape
    start, total = 0, 0.0
    for level, (h, w) in enumerate(level_shapes):
        feature = value[:, start : start + h * w].reshape(batch, h, w, heads, width)
        start += h * w
        total += (weights[:, :, :, level, :, None] * sample(feature, locations[:, :, :, level])).sum(3)
    return jnp.asarray(total).reshape(batch, -1, heads * width)
