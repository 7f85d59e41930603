"""Deformable attention in plain XLA operations, with its derivative written out.

One point of every query at a time (`lax.scan`): four gathers of whole rows going forward, four scatter-adds of whole
rows going back. Nothing of size queries × points × d is ever kept, and both directions stream through memory.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

LevelShapes = tuple[tuple[int, int], ...]


class Point(NamedTuple):
    """One sampling point of every query and head, and the level it reads."""

    location: Float[Array, "B Q H 2"]  # (x, y) in [0, 1]
    weight: Float[Array, "B Q H"]
    size: Float[Array, "2"]  # (w, h) of the level
    start: Int[Array, ""]  # first token of the level


class Corner(NamedTuple):
    """One of the four cells around a point."""

    row: Int[Array, "B Q H"]  # of the value laid out as [B·S·H, d]; always in bounds
    inside: Bool[Array, "B Q H"]
    along_x: Float[Array, "B Q H"]  # 1 − |x − x_cell|
    along_y: Float[Array, "B Q H"]
    right: int  # 0 or 1
    below: int

    @property
    def share(self) -> Float[Array, "B Q H"]:
        return jnp.where(self.inside, self.along_x * self.along_y, 0.0)


def _corners(point: Point, tokens: int) -> list[Corner]:
    batch, _, heads, _ = point.location.shape
    # Clipping far points to just outside the map keeps the integers below from overflowing; they still read nothing.
    xy = jnp.clip(point.location * point.size - 0.5, -2.0, point.size + 1.0)
    cell = jnp.floor(xy)
    fraction = xy - cell
    first = jnp.arange(batch)[:, None, None] * tokens + point.start
    corners = []
    for below in (0, 1):
        for right in (0, 1):
            column, row = cell[..., 0] + right, cell[..., 1] + below
            inside = (column >= 0) & (column < point.size[0]) & (row >= 0) & (row < point.size[1])
            column = jnp.clip(column, 0, point.size[0] - 1).astype(jnp.int32)
            row = jnp.clip(row, 0, point.size[1] - 1).astype(jnp.int32)
            token = first + row * point.size[0].astype(jnp.int32) + column
            along_x = fraction[..., 0] if right else 1 - fraction[..., 0]
            along_y = fraction[..., 1] if below else 1 - fraction[..., 1]
            corners.append(Corner(token * heads + jnp.arange(heads), inside, along_x, along_y, right, below))
    return corners


def _read(rows: Float[Array, "R d"], corner: Corner) -> Float[Array, "B Q H d"]:
    return rows.at[corner.row].get(mode="promise_in_bounds").astype(jnp.float32)


def _points(
    level_shapes: LevelShapes, locations: Float[Array, "B Q H L P 2"], weights: Float[Array, "B Q H L P"]
) -> Point:
    """All points with the axis to scan over (levels × points) in front, in float32."""
    batch, queries, heads, _, points, _ = locations.shape
    sizes = np.array([(w, h) for h, w in level_shapes], np.float32)
    starts = np.cumsum([0] + [h * w for h, w in level_shapes[:-1]]).astype(np.int32)
    return Point(
        jnp.moveaxis(locations.astype(jnp.float32).reshape(batch, queries, heads, -1, 2), 3, 0),
        jnp.moveaxis(weights.astype(jnp.float32).reshape(batch, queries, heads, -1), 3, 0),
        jnp.asarray(np.repeat(sizes, points, axis=0)),
        jnp.asarray(np.repeat(starts, points)),
    )


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def deformable_attention(
    value: Float[Array, "B S H d"],
    level_shapes: LevelShapes,
    locations: Float[Array, "B Q H L P 2"],
    weights: Float[Array, "B Q H L P"],
) -> Float[Array, "B Q Hd"]:
    """Σ over levels l and points p of weights[…, l, p] · value at locations[…, l, p], for each head.

    `level_shapes` are the static (h, w) of the L levels, whose cells are the S tokens, row by row. `locations` are
    (x, y) in [0, 1] of the padded level: u reads at u·w − ½ bilinearly, and cells outside the level count as zero.
    Sums in float32 whatever the dtype of `value`; the result has that dtype.
    """
    batch, tokens, heads, width = value.shape
    rows = value.reshape(-1, width)

    def add_point(total, point: Point):
        read = sum(corner.share[..., None] * _read(rows, corner) for corner in _corners(point, tokens))
        return total + point.weight[..., None] * read, None

    empty = jnp.zeros((batch, locations.shape[1], heads, width), jnp.float32)
    total, _ = lax.scan(add_point, empty, _points(level_shapes, locations, weights))
    return total.reshape(batch, -1, heads * width).astype(value.dtype)


def _forward(value, level_shapes, locations, weights):
    return deformable_attention(value, level_shapes, locations, weights), (value, locations, weights)


def _backward(level_shapes, residuals, cotangent):
    value, locations, weights = residuals
    batch, tokens, heads, width = value.shape
    rows = value.reshape(-1, width)
    cotangent = cotangent.reshape(batch, -1, heads, width).astype(jnp.float32)

    def point_gradient(rows_gradient, point: Point):
        to_weight, to_x, to_y = 0.0, 0.0, 0.0
        for corner in _corners(point, tokens):
            amount = (point.weight * corner.share)[..., None] * cotangent
            rows_gradient = rows_gradient.at[corner.row].add(amount, mode="promise_in_bounds")
            # ⟨cotangent, value of the cell⟩: what one unit of this corner's share is worth
            # (as a dot product: XLA's CPU reductions along the last axis take twice the time).
            worth = jnp.einsum("bqhd,bqhd->bqh", cotangent, _read(rows, corner), precision=lax.Precision.HIGHEST)
            worth = jnp.where(corner.inside, worth, 0.0)
            to_weight += corner.along_x * corner.along_y * worth
            to_x += (1 if corner.right else -1) * corner.along_y * worth
            to_y += (1 if corner.below else -1) * corner.along_x * worth
        to_location = jnp.stack([to_x, to_y], -1) * point.weight[..., None] * point.size
        return rows_gradient, (to_location, to_weight)

    rows_gradient, (to_locations, to_weights) = lax.scan(
        point_gradient, jnp.zeros(rows.shape, jnp.float32), _points(level_shapes, locations, weights)
    )
    return (
        rows_gradient.reshape(value.shape).astype(value.dtype),
        jnp.moveaxis(to_locations, 0, 3).reshape(locations.shape).astype(locations.dtype),
        jnp.moveaxis(to_weights, 0, 3).reshape(weights.shape).astype(weights.dtype),
    )


deformable_attention.defvjp(_forward, _backward)
