"""Deformable attention on GPUs: two kernels in Pallas, through its Triton back end.

One program does one head of a block of queries of one image. It keeps a tile [queries, d] of sums in registers and
walks over the points; each point is four gathers of rows of the value going forward, and going back four gathers
and four atomic additions. Nothing of size queries × points × d exists anywhere.

With the pixel (x, y) = location · (w, h) − ½ of a point, its weight a, and a cell c at (x_c, y_c) around it,

    share_c = (1 − |x − x_c|) · (1 − |y − y_c|)
    out     = Σ_points a · Σ_c share_c · value_c

and for a cotangent g of out, with worth_c = ⟨g, value_c⟩:

    ∂value_c  = Σ_points a · share_c · g                            (many queries add to a cell: atomics)
    ∂a        = Σ_c share_c · worth_c
    ∂location = a · (w · Σ_c ±(1 − |y − y_c|) · worth_c,  h · Σ_c ±(1 − |x − x_c|) · worth_c),  + right of / below it

Method: docs/method.md#2-backbone-neck-encoder.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Int

from opendet_jax.ops.deformable_attention.reference import LevelShapes, level_starts

# Numbers in a tile [queries, d]. Going forward a thread has 8 of them, so that several gathers are under way; going
# back 4, one vector: its atomic additions wait for each other (Pallas orders them), so many threads do few each.
FORWARD_TILE, BACKWARD_TILE = 1024, 512
WARPS = 4


class Corner(NamedTuple):
    """One of the four cells around a point of every query of the block."""

    token: Int[Array, "q"]  # in bounds even where the cell is outside
    inside: Bool[Array, "q"]
    along_x: Float[Array, "q"]  # 1 − |x − x_c|
    along_y: Float[Array, "q"]
    sign_x: int  # −1 left of the point, +1 right of it
    sign_y: int  # −1 above, +1 below

    @property
    def share(self) -> Float[Array, "q"]:
        return jnp.where(self.inside, self.along_x * self.along_y, 0.0)


class Block(NamedTuple):
    """What a program works on. Sizes inside a Triton kernel are powers of two: masks say what is real."""

    image: Int[Array, ""]
    head: Int[Array, ""]
    queries: Int[Array, "q"]
    real: Bool[Array, "q"]
    channels: Int[Array, "d"]
    within: Bool[Array, "d"]

    @property
    def tile(self) -> tuple[Array, ...]:
        """Indices of the block's tile in an array [B, Q, H, d]."""
        return self.image, self.queries[:, None], self.head, self.channels[None, :]

    @property
    def tile_mask(self) -> Bool[Array, "q d"]:
        return self.real[:, None] & self.within[None, :]

    def row(self, corner: Corner) -> tuple[Array, ...]:
        """Indices of a corner's rows in an array [B, S, H, d]."""
        return self.image, corner.token[:, None], self.head, self.channels[None, :]

    def row_mask(self, corner: Corner) -> Bool[Array, "q d"]:
        return (self.real & corner.inside)[:, None] & self.within[None, :]


def _block(value: Any, locations: Any, count: int) -> Block:
    """The block of `count` queries of this program."""
    _, _, heads, width = value.shape
    channels = jnp.arange(pl.next_power_of_2(width))
    queries = pl.program_id(0) * count + jnp.arange(count)
    image, head = pl.program_id(1) // heads, pl.program_id(1) % heads
    return Block(image, head, queries, queries < locations.shape[1], channels, channels < width)


def _point(locations: Any, weights: Any, block: Block, level: int, point, size: tuple[int, int]):
    """x, y in pixels and the weight of one point of every query."""
    height, width = size
    index = (block.image, block.queries, block.head, level, point)
    x = plgpu.load(locations.at[*index, 0], mask=block.real, other=0.0).astype(jnp.float32)
    y = plgpu.load(locations.at[*index, 1], mask=block.real, other=0.0).astype(jnp.float32)
    weight = plgpu.load(weights.at[*index], mask=block.real, other=0.0).astype(jnp.float32)
    # Clipping far points to just outside the map keeps the integers below from overflowing; they still read nothing.
    return jnp.clip(x * width - 0.5, -2.0, width + 1.0), jnp.clip(y * height - 0.5, -2.0, height + 1.0), weight


def _corners(x, y, size: tuple[int, int], start: int) -> Iterator[Corner]:
    height, width = size
    left, top = jnp.floor(x), jnp.floor(y)
    for below in (0, 1):
        for right in (0, 1):
            column, row = left + right, top + below
            inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
            token = start + row.astype(jnp.int32) * width + column.astype(jnp.int32)
            yield Corner(
                jnp.where(inside, token, start),
                inside,
                1.0 - jnp.abs(x - column),
                1.0 - jnp.abs(y - row),
                2 * right - 1,
                2 * below - 1,
            )


def _read(value: Any, block: Block, corner: Corner) -> Float[Array, "q d"]:
    rows = plgpu.load(value.at[*block.row(corner)], mask=block.row_mask(corner), other=0.0)
    return rows.astype(jnp.float32)


def _forward_kernel(value, locations, weights, out, *, count: int, level_shapes: LevelShapes):
    block = _block(value, locations, count)
    total = jnp.zeros(block.tile_mask.shape, jnp.float32)
    for level, (size, start) in enumerate(zip(level_shapes, level_starts(level_shapes), strict=True)):

        def add_point(point, total, level=level, size=size, start=start):
            x, y, weight = _point(locations, weights, block, level, point, size)
            for corner in _corners(x, y, size, start):
                total += (weight * corner.share)[:, None] * _read(value, block, corner)
            return total

        total = lax.fori_loop(0, weights.shape[-1], add_point, total)
    plgpu.store(out.at[*block.tile], total.astype(out.dtype), mask=block.tile_mask)


def _backward_kernel(
    value,
    locations,
    weights,
    cotangent,
    _,  # the zeros that to_value starts as
    to_value,
    to_locations,
    to_weights,
    *,
    count: int,
    level_shapes: LevelShapes,
    interpret: bool,
):
    block = _block(value, locations, count)
    tile = plgpu.load(cotangent.at[*block.tile], mask=block.tile_mask, other=0.0).astype(jnp.float32)
    for level, (size, start) in enumerate(zip(level_shapes, level_starts(level_shapes), strict=True)):

        def point_gradient(point, nothing, level=level, size=size, start=start):
            x, y, weight = _point(locations, weights, block, level, point, size)
            to_weight, to_x, to_y = (jnp.zeros_like(weight) for _ in range(3))
            for corner in _corners(x, y, size, start):
                amount = (weight * corner.share)[:, None] * tile
                _add(to_value, block.row(corner), amount, block.row_mask(corner), interpret)
                worth = jnp.sum(tile * _read(value, block, corner), axis=1)  # 0 outside, where nothing is read
                to_weight += corner.share * worth
                to_x += corner.sign_x * corner.along_y * worth
                to_y += corner.sign_y * corner.along_x * worth
            height, width = size
            index = (block.image, block.queries, block.head, level, point)
            plgpu.store(to_locations.at[*index, 0], (weight * to_x * width).astype(to_locations.dtype), mask=block.real)
            plgpu.store(
                to_locations.at[*index, 1], (weight * to_y * height).astype(to_locations.dtype), mask=block.real
            )
            plgpu.store(to_weights.at[*index], to_weight.astype(to_weights.dtype), mask=block.real)
            return nothing

        lax.fori_loop(0, weights.shape[-1], point_gradient, None)


def _add(ref: Any, index: tuple, amount: Float[Array, "q d"], mask: Bool[Array, "q d"], interpret: bool) -> None:
    """Atomic addition. The interpreter's own knows no mask and loses all but one of equal indices."""
    if interpret:
        ref[...] = ref[...].at[index].add(jnp.where(mask, amount, 0.0), mode="drop")
    else:
        plgpu.atomic_add(ref, index, amount, mask=mask)


def _call(kernel, tile: int, value, locations, out_shape, interpret: bool, **keywords):
    batch, queries, heads = locations.shape[:3]
    count = max(1, tile // pl.next_power_of_2(value.shape[-1]))
    return pl.pallas_call(
        partial(kernel, count=count),
        out_shape,
        grid=(pl.cdiv(queries, count), batch * heads),
        interpret=interpret,
        # Named, because the default GPU back end of Pallas is another one (Mosaic), which cannot gather.
        compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=1),
        **keywords,
    )


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
    shape = jax.ShapeDtypeStruct((batch, queries, heads, value.shape[-1]), value.dtype)
    kernel = partial(_forward_kernel, level_shapes=level_shapes)
    call = _call(kernel, FORWARD_TILE, value, locations, shape, interpret, name="deformable_attention_forward")
    out = call(value, locations, weights)
    return out.reshape(batch, queries, -1)


def backward(
    value: Float[Array, "B S H d"],
    locations: Float[Array, "B Q H L P 2"],
    weights: Float[Array, "B Q H L P"],
    cotangent: Float[Array, "B Q Hd"],
    *,
    level_shapes: LevelShapes,
    interpret: bool = False,
) -> tuple[Float[Array, "B S H d"], Float[Array, "B Q H L P 2"], Float[Array, "B Q H L P"]]:
    """Gradients of value, locations and weights. The value's is summed in float32: there are no bfloat16 atomics."""
    batch, queries, heads = locations.shape[:3]
    zeros = jnp.zeros(value.shape, jnp.float32)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (zeros, locations, weights)]
    kernel = partial(_backward_kernel, level_shapes=level_shapes, interpret=interpret)
    call = _call(
        kernel,
        BACKWARD_TILE,
        value,
        locations,
        shapes,
        interpret,
        input_output_aliases={4: 0},
        name="deformable_attention_backward",
    )
    cotangent = cotangent.reshape(batch, queries, heads, -1)
    to_value, to_locations, to_weights = call(value, locations, weights, cotangent, zeros)
    return to_value.astype(value.dtype), to_locations, to_weights
