"""Deformable attention on TPUs: matrix products in place of gathers, which a TPU core does not have. Written in Pallas.

Bilinear reading is a product with a hat function, so for one head the operation is a matrix product

    out = Wᵀ V,   W[s, q] = Σ_p a_qp · hat(x_qp − x_s) · hat(y_qp − y_s),   hat(u) = max(0, 1 − |u|)

over the cells s of a level and its points p, in pixels. W is made tile by tile in fast memory and never kept. Cells
outside a level do not exist in it, so they count as zero by themselves. For a cotangent g of out, with G = V gᵀ:

    ∂V      = W g
    ∂a_qp   =        Σ_s G[s, q] · hat(x_qp − x_s)  · hat(y_qp − y_s)
    ∂x_qp   = a_qp · Σ_s G[s, q] · hat'(x_qp − x_s) · hat(y_qp − y_s),     ∂y_qp likewise

A tile that no point of its queries reaches is skipped: neighbouring queries look at neighbouring cells, so most are.
`tpu_layout` has the blocks that tiles are made of.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from opendet_jax.ops.deformable_attention.arguments import LevelShapes
from opendet_jax.ops.deformable_attention.tpu_layout import make_grid, queries_last, tokens_first, tokens_last


def _hat(distance):
    return jnp.maximum(0.0, 1.0 - jnp.abs(distance))


def _slope(distance):
    """hat', at its corners the limit from the right, as reading the cells around floor(x) has it."""
    rising, falling = (distance >= -1) & (distance < 0), (distance >= 0) & (distance < 1)
    return jnp.where(rising, 1.0, jnp.where(falling, -1.0, 0.0))


class Tile(NamedTuple):
    """A block of tokens against a block of queries."""

    points: Any  # [1, 1, 1, 3·P, queries]
    column: Int[Array, "tokens 1"]
    row: Int[Array, "tokens 1"]
    reached: Any  # whether any point is within a cell of any of its tokens

    @property
    def count(self) -> int:
        return self.points.shape[3] // 3

    def point(self, p: int):
        """x − x_s and y − y_s [tokens, queries], weight [1, queries]."""
        x, y, weight = (self.points[0, 0, 0, pl.ds(part * self.count + p, 1), :] for part in range(3))
        return x - self.column, y - self.row, weight

    def matrix(self) -> Float[Array, "tokens queries"]:
        """W."""
        total: Any = 0.0
        for p in range(self.count):
            x, y, weight = self.point(p)
            total += _hat(x) * (_hat(y) * weight)
        return total


def _tile(tables, block, points, tokens: int) -> Tile:
    _, first_of, width_of = tables
    first, width = first_of[block], width_of[block]
    cell = first + lax.broadcasted_iota(jnp.int32, (tokens, 1), 0)
    row = lax.div(cell, width)  # as no operand is negative; `//` looks at signs
    column = cell - row * width
    count = points.shape[3] // 3
    y = points[0, 0, 0, count : 2 * count, :]
    top, bottom = (lax.div(end, width).astype(jnp.float32) for end in (first, first + tokens - 1))
    near = jnp.where((y > top - 1) & (y < bottom + 1), 1.0, 0.0)
    return Tile(points, column.astype(jnp.float32), row.astype(jnp.float32), jnp.max(near) > 0)


def _product(a, b, contract: tuple[int, int]) -> Float[Array, "m n"]:
    """Matrix product over axis contract[0] of `a` and contract[1] of `b`, summed in float32.

    Exact products of float32 where `a` (value or cotangent) has it; a bfloat16 `a` rounds `b` to bfloat16 too.
    """
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = ((contract[:1], contract[1:]), ((), ()))
    return lax.dot_general(a, b.astype(a.dtype), dimensions, precision, preferred_element_type=jnp.float32)


def _forward_kernel(level, first, width, value, points, out, total):
    block, blocks = pl.program_id(3), pl.num_programs(3)
    tile = _tile((level, first, width), block, points, value.shape[-1])

    @pl.when(block == 0)
    def _():
        total[...] = jnp.zeros_like(total)

    @pl.when(tile.reached)
    def _():
        total[...] += _product(value[0, 0], tile.matrix(), (1, 0))

    @pl.when(block == blocks - 1)
    def _():
        out[0, 0] = total[...].astype(out.dtype)


def _value_kernel(level, first, width, cotangent, points, to_value, total):
    step, steps = pl.program_id(3), pl.num_programs(3)
    tile = _tile((level, first, width), pl.program_id(2), points, to_value.shape[-1])

    @pl.when(step == 0)
    def _():
        total[...] = jnp.zeros_like(total)

    @pl.when(tile.reached)
    def _():
        total[...] += _product(cotangent[0, 0], tile.matrix(), (1, 1))

    @pl.when(step == steps - 1)
    def _():
        to_value[0, 0] = total[...].astype(to_value.dtype)


def _points_kernel(level, first, width, value, cotangent, points, to_points):
    block = pl.program_id(3)
    tile = _tile((level, first, width), block, points, value.shape[-1])

    @pl.when(first[block] == 0)
    def _():
        to_points[...] = jnp.zeros_like(to_points)

    @pl.when(tile.reached)
    def _():
        worth = _product(value[0, 0], cotangent[0, 0], (0, 0))  # G
        for p in range(tile.count):
            x, y, weight = tile.point(p)
            along_x = _hat(x) * worth
            rows = (weight * _slope(x) * _hat(y) * worth, weight * _slope(y) * along_x, _hat(y) * along_x)
            for part, terms in enumerate(rows):
                to_points[0, 0, 0, pl.ds(part * tile.count + p, 1), :] += jnp.sum(terms, 0, keepdims=True)


def forward(
    value: Float[Array, "B S H d"],
    locations: Float[Array, "B Q H L P 2"],
    weights: Float[Array, "B Q H L P"],
    *,
    level_shapes: LevelShapes,
    interpret: bool = False,
) -> Float[Array, "B Q Hd"]:
    """As the public operation. `interpret` runs the kernel on any platform, slowly."""
    batch, queries, heads = locations.shape[:3]
    width = value.shape[-1]
    grid = make_grid(locations, weights, level_shapes, tokens_inner=True)
    shape = jax.ShapeDtypeStruct((batch, heads, width, grid.points.shape[-1]), value.dtype)
    value = tokens_last(value, level_shapes, grid.tokens)
    total = (width, grid.queries)
    out = grid.run(_forward_kernel, [value], [grid.by_token(width)], grid.by_query(width), shape, interpret, total)
    return out[..., :queries].transpose(0, 3, 1, 2).reshape(batch, queries, -1)


def backward(
    value: Float[Array, "B S H d"],
    locations: Float[Array, "B Q H L P 2"],
    weights: Float[Array, "B Q H L P"],
    cotangent: Float[Array, "B Q Hd"],
    *,
    level_shapes: LevelShapes,
    interpret: bool = False,
) -> tuple[Float[Array, "B S H d"], Float[Array, "B Q H L P 2"], Float[Array, "B Q H L P"]]:
    """Gradients of value, locations and weights."""
    batch, queries, heads, levels, points, _ = locations.shape
    width = value.shape[-1]
    outer = make_grid(locations, weights, level_shapes, tokens_inner=False)
    inner = outer._replace(tokens_inner=True)
    value_t = tokens_last(value, level_shapes, outer.tokens)
    cotangent = queries_last(cotangent.reshape(batch, queries, heads, width), outer.queries)

    shape = jax.ShapeDtypeStruct(value_t.shape, value.dtype)
    total = (width, outer.tokens)
    to_value = outer.run(
        _value_kernel, [cotangent], [outer.by_query(width)], outer.by_token(width), shape, interpret, total
    )
    specs = [inner.by_token(width), inner.by_query(width)]
    shape = jax.ShapeDtypeStruct(inner.points.shape, jnp.float32)
    to_points = inner.run(_points_kernel, [value_t, cotangent], specs, inner.by_point(), shape, interpret)

    to_points = to_points[..., :queries].reshape(batch, heads, levels, 3, points, queries).transpose(3, 0, 5, 1, 2, 4)
    extent = jnp.array([(w, h) for h, w in level_shapes], jnp.float32)[:, None]
    to_locations = jnp.stack([to_points[0], to_points[1]], -1) * extent
    return (
        tokens_first(to_value, level_shapes, outer.tokens),
        to_locations.astype(locations.dtype),
        to_points[2].astype(weights.dtype),
    )
