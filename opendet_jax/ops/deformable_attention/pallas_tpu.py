"""Deformable attention on TPUs: matrix products in place of gathers, which a TPU core does not have. Written in Pallas.

Bilinear reading is a product with a hat function, so for one head the operation is a matrix product

    out = Wᵀ V,   W[s, q] = Σ_p a_qp · hat(x_qp − x_s) · hat(y_qp − y_s),   hat(u) = max(0, 1 − |u|)

over the cells s of a level and its points p, in pixels. W is made tile by tile in fast memory and never kept. Cells
outside a level do not exist in it, so they count as zero by themselves. For a cotangent g of out, with G = V gᵀ:

    ∂V      = W g
    ∂a_qp   =        Σ_s G[s, q] · hat(x_qp − x_s)  · hat(y_qp − y_s)
    ∂x_qp   = a_qp · Σ_s G[s, q] · hat'(x_qp − x_s) · hat(y_qp − y_s),     ∂y_qp likewise

A tile that no point of its queries reaches is skipped: neighbouring queries look at neighbouring cells, so most are.
The kernels see tokens and queries in lanes (the last axis), and a grid over blocks of both.

Method: docs/method.md#2-backbone-neck-encoder.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from opendet_jax.ops.deformable_attention.reference import LevelShapes, level_starts

LANES = 128
TOKENS = 512  # of a block: a tile [tokens, queries] of float32 is half a MiB
QUERIES = 256
NOWHERE = -4.0  # a pixel that no cell is near


class Tables(NamedTuple):
    """What each block of tokens is, in scalar memory."""

    level: Int[np.ndarray, "blocks"]
    first: Int[np.ndarray, "blocks"]  # its first cell, counted from the level's start
    width: Int[np.ndarray, "blocks"]  # of the level


def make_tables(level_shapes: LevelShapes, size: int) -> Tables:
    rows = [(level, first, w) for level, (h, w) in enumerate(level_shapes) for first in range(0, h * w, size)]
    return Tables(*np.array(rows, np.int32).T)


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _block_sizes(level_shapes: LevelShapes, queries: int) -> tuple[int, int]:
    largest = max(h * w for h, w in level_shapes)
    return min(TOKENS, _round_up(largest, LANES)), min(QUERIES, _round_up(queries, LANES))


def tokens_last(value: Float[Array, "B S H d"], level_shapes: LevelShapes, size: int) -> Float[Array, "B H d S2"]:
    value = value.transpose(0, 2, 3, 1)
    levels = []
    for (h, w), start in zip(level_shapes, level_starts(level_shapes), strict=True):
        level = value[..., start : start + h * w]
        levels.append(jnp.pad(level, ((0, 0), (0, 0), (0, 0), (0, _round_up(h * w, size) - h * w))))
    return jnp.concatenate(levels, -1)


def tokens_first(gradient: Float[Array, "B H d S2"], level_shapes: LevelShapes, size: int) -> Float[Array, "B S H d"]:
    levels, start = [], 0
    for h, w in level_shapes:
        levels.append(gradient[..., start : start + h * w])
        start += _round_up(h * w, size)
    return jnp.concatenate(levels, -1).transpose(0, 3, 1, 2)


def queries_last(x: Float[Array, "B Q H d"], size: int, fill: float = 0.0) -> Float[Array, "B H d Q2"]:
    queries = x.shape[1]
    x = jnp.pad(x, ((0, 0), (0, _round_up(queries, size) - queries), (0, 0), (0, 0)), constant_values=fill)
    return x.transpose(0, 2, 3, 1)


def make_points(locations, weights, level_shapes: LevelShapes, size: int) -> Float[Array, "B H L P3 Q2"]:
    """x in pixels, y in pixels and weight of all points of a level, one below the other."""
    batch, queries, heads, levels, points, _ = locations.shape
    extent = jnp.array([(w, h) for h, w in level_shapes], jnp.float32)[:, None]
    pixels = jnp.clip(locations.astype(jnp.float32) * extent - 0.5, -2.0, extent + 1.0)
    stacked = jnp.concatenate([pixels[..., 0], pixels[..., 1], weights.astype(jnp.float32)], -1)
    # Queries that fill the last block are nowhere; what their weight is does not matter then.
    stacked = queries_last(stacked.reshape(batch, queries, heads, -1), size, fill=NOWHERE)
    return stacked.reshape(batch, heads, levels, 3 * points, -1)


class Grid(NamedTuple):
    """A grid [image, head, outer, inner] over blocks of queries and of tokens, and the blocks its programs see."""

    tables: Tables
    points: Float[Array, "B H L P3 Q2"]
    tokens: int
    queries: int
    tokens_inner: bool

    def _spec(self, shape: tuple[int, ...], index) -> pl.BlockSpec:
        def index_map(image, head, outer, inner, level, *_):
            query, token = (outer, inner) if self.tokens_inner else (inner, outer)
            return index(image, head, query, token, level[token])

        return pl.BlockSpec(shape, index_map)

    def by_token(self, width: int) -> pl.BlockSpec:
        return self._spec((1, 1, width, self.tokens), lambda b, h, _, token, __: (b, h, 0, token))

    def by_query(self, width: int) -> pl.BlockSpec:
        return self._spec((1, 1, width, self.queries), lambda b, h, query, *_: (b, h, 0, query))

    def by_point(self) -> pl.BlockSpec:
        """The points that a block of queries has on the level of a block of tokens."""
        shape = (1, 1, 1, self.points.shape[3], self.queries)
        return self._spec(shape, lambda b, h, query, _, level: (b, h, level, 0, query))

    def run(self, kernel, arrays, in_specs, out_spec, out_shape, interpret: bool, total: tuple[int, int] | None = None):
        batch, heads = self.points.shape[:2]
        queries, tokens = self.points.shape[-1] // self.queries, len(self.tables.level)
        return pl.pallas_call(
            kernel,
            out_shape,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(self.tables),
                grid=(batch, heads, queries, tokens) if self.tokens_inner else (batch, heads, tokens, queries),
                in_specs=[*in_specs, self.by_point()],
                out_specs=out_spec,
                scratch_shapes=[pltpu.VMEM(total, jnp.float32)] if total else [],
            ),
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 3 + ("arbitrary",)),
            interpret=interpret,
            name=f"deformable_attention{kernel.__name__.removesuffix('_kernel')}",
        )(*map(jnp.asarray, self.tables), *arrays, self.points)


def make_grid(locations, weights, level_shapes: LevelShapes, tokens_inner: bool) -> Grid:
    tokens, queries = _block_sizes(level_shapes, locations.shape[1])
    points = make_points(locations, weights, level_shapes, queries)
    return Grid(make_tables(level_shapes, tokens), points, tokens, queries, tokens_inner)


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
