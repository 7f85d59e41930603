"""How the TPU kernels see the arrays: tokens and queries in lanes (the last axis), and a grid over blocks of both.

Levels are padded to whole blocks of tokens, so that a block belongs to one level; `Tables` say to which.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from opendet_jax.ops.deformable_attention.arguments import LevelShapes, level_starts

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
