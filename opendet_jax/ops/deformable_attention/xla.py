"""Deformable attention in plain XLA operations, with its derivative written out.

One point of every query at a time (`lax.scan`): four gathers of whole rows going forward, four scatter-adds of whole
rows going back. Nothing of size queries × points × d is ever kept, and both directions stream through memory.

Method: docs/method.md#2-backbone-neck-encoder.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from opendet_jax.ops.deformable_attention.reference import LevelShapes, level_starts

ROWS_AT_ONCE = 12_800  # summands of the value's gradient, 128 bytes each at width 32: they stay in the cache


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
    starts = np.array(level_starts(level_shapes), np.int32)
    return Point(
        jnp.moveaxis(locations.astype(jnp.float32).reshape(batch, queries, heads, -1, 2), 3, 0),
        jnp.moveaxis(weights.astype(jnp.float32).reshape(batch, queries, heads, -1), 3, 0),
        jnp.asarray(np.repeat(sizes, points, axis=0)),
        jnp.asarray(np.repeat(starts, points)),
    )


def forward(
    value: Float[Array, "B S H d"],
    locations: Float[Array, "B Q H L P 2"],
    weights: Float[Array, "B Q H L P"],
    *,
    level_shapes: LevelShapes,
) -> Float[Array, "B Q Hd"]:
    """As the public operation."""
    batch, tokens, heads, width = value.shape
    rows = value.reshape(-1, width)

    def add_point(total, point: Point):
        read = sum(corner.share[..., None] * _read(rows, corner) for corner in _corners(point, tokens))
        return total + point.weight[..., None] * read, None

    empty = jnp.zeros((batch, locations.shape[1], heads, width), jnp.float32)
    total, _ = lax.scan(add_point, empty, _points(level_shapes, locations, weights))
    return total.reshape(batch, -1, heads * width).astype(value.dtype)


def _spread(
    total: Float[Array, "R d"], points: Point, cotangent: Float[Array, "B Q H d"], tokens: int
) -> Float[Array, "R d"]:
    """`total` with what each point gives back to its four cells; `points` has the axis to scan over in front.

    XLA writes all summands of a scatter-add before it adds the first: so a part of the queries at a time.
    """
    batch, queries, heads, _ = cotangent.shape
    parts = max(1, -(-batch * queries * heads // ROWS_AT_ONCE))
    each = -(-queries // parts)

    def cut(x: Array, axis: int, part: int | Int[Array, ""]) -> Array:
        return lax.dynamic_slice_in_dim(x, part * each, each, axis)

    def padded(x: Array, axis: int) -> Array:
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, parts * each - queries)
        return jnp.pad(x, widths)

    points = points._replace(location=padded(points.location, 2), weight=padded(points.weight, 2))
    cotangent = padded(cotangent, 1)

    def add_part(part, total):
        own = points._replace(location=cut(points.location, 2, part), weight=cut(points.weight, 2, part))
        given = cut(cotangent, 1, part)

        def add_point(total, point: Point):
            for corner in _corners(point, tokens):
                amount = (point.weight * corner.share)[..., None] * given
                total = total.at[corner.row].add(amount, mode="promise_in_bounds")
            return total, None

        return lax.scan(add_point, total, own)[0]

    return lax.fori_loop(0, parts, add_part, total)


def backward(
    value: Float[Array, "B S H d"],
    locations: Float[Array, "B Q H L P 2"],
    weights: Float[Array, "B Q H L P"],
    cotangent: Float[Array, "B Q Hd"],
    *,
    level_shapes: LevelShapes,
) -> tuple[Float[Array, "B S H d"], Float[Array, "B Q H L P 2"], Float[Array, "B Q H L P"]]:
    """Gradients of value, locations and weights."""
    batch, tokens, heads, width = value.shape
    rows = value.reshape(-1, width)
    cotangent = cotangent.reshape(batch, -1, heads, width).astype(jnp.float32)
    points = _points(level_shapes, locations, weights)

    def worth(factor: Callable[[Corner], Float[Array, "B Q H"]]) -> Float[Array, "LP B Q H"]:
        """⟨cotangent, Σ factor · value of the cell⟩ over the four cells of every point."""

        def of_point(_, point: Point):
            read = sum(
                jnp.where(corner.inside, factor(corner), 0.0)[..., None] * _read(rows, corner)
                for corner in _corners(point, tokens)
            )
            return None, jnp.matmul(cotangent * read, jnp.ones(width), precision=lax.Precision.HIGHEST)

        return lax.scan(of_point, None, points)[1]

    # Four loops, because XLA's CPU compiler makes one pass in vector registers of four reads that are summed, and five
    # slow ones of four reads with three uses; so are its sums along a last axis, but not its products with ones.
    to_rows = _spread(jnp.zeros(rows.shape, jnp.float32), points, cotangent, tokens)
    to_weights = worth(lambda corner: corner.along_x * corner.along_y)
    to_x = worth(lambda corner: (1 if corner.right else -1) * corner.along_y)
    to_y = worth(lambda corner: (1 if corner.below else -1) * corner.along_x)
    to_locations = jnp.stack([to_x, to_y], -1) * points.weight[..., None] * points.size[:, None, None, None]
    return (
        to_rows.reshape(value.shape).astype(value.dtype),
        jnp.moveaxis(to_locations, 0, 3).reshape(locations.shape).astype(locations.dtype),
        jnp.moveaxis(to_weights, 0, 3).reshape(weights.shape).astype(weights.dtype),
    )
