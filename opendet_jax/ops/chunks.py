"""Work for what is real, at static shapes: of many rows of items few are real, and those are computed chunk by chunk.

Rows are the names of a batch, items their tokens; or rows of a single item. The real items are laid one after the other
(`pack`), and only the chunks that hold some are computed (`live_chunks`): the time is that of the real items, whatever
room there is for others.

Method: docs/method.md#7-object-name-generator.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int


@struct.dataclass
class Places:
    """What stands in a chunk."""

    row: Int[Array, "*n c"]
    position: Int[Array, "*n c"]  # in the row
    real: Bool[Array, "*n c"]  # else there is nothing at this place, and the two above mean nothing


@struct.dataclass
class Packing:
    """Where the items stand. A chunk has room for c items and holds whole rows, one after the other."""

    places: Places  # [n, c]
    place: Int[Array, "R T"]  # of every item among the n·c places; of an item that is not real, any
    live: Int[Array, ""]  # so many chunks, the first, hold something

    def unpack(self, values: Float[Array, "n c *d"]) -> Float[Array, "R T *d"]:
        """What was computed in the chunks, row by row; for items that are not real, what stands at some place."""
        return jnp.take(values.reshape(-1, *values.shape[2:]), self.place, axis=0)


def pack(real: Bool[Array, "R T"], size: int) -> Packing:
    """Packs the real items into chunks of `size`.

    A row belongs to the chunk k in whose share of the real items, `stride` from k · `stride` on, it begins. Its end may
    lie in the next share: a chunk has room for that.
    """
    rows, longest = real.shape
    stride = size - longest + 1
    if stride < 1:
        raise ValueError(f"a row of {longest} items does not go into a chunk of {size}")
    flat = real.reshape(-1)
    order = jnp.argsort(~flat, stable=True)
    lengths = real.sum(axis=1)
    start = jnp.cumsum(lengths) - lengths
    chunk = start // stride
    chunks = jnp.arange(-(-flat.size // stride))[:, None]
    wanted = chunks * stride + jnp.arange(size)
    item = order[jnp.minimum(wanted, flat.size - 1)]
    row, position = jnp.divmod(item, longest)
    nth = jnp.maximum(jnp.cumsum(flat).reshape(rows, longest) - 1, 0)
    return Packing(
        places=Places(row, position, real=(wanted < flat.sum()) & (chunk[row] == chunks)),
        place=jnp.minimum(chunk[:, None] * (size - stride) + nth, chunks.size * size - 1),
        live=-(-flat.sum() // stride),
    )


def live_chunks(
    function: Callable[[Any, Any], Float[Array, "c *d"]], shared: Any, chunks: Any, live: Int[Array, ""]
) -> Float[Array, "n c *d"]:
    """`function(shared, chunk)` of the first `live` of n chunks by a loop of that many rounds, zeros after them.

    `chunks` is a tree of arrays [n, …]. `shared`, a tree of float arrays, has gradients, `chunks` has none. JAX does
    not define the reverse of a loop of unknown length: here each round is taken back by itself, its values computed
    once more, so that no array over all chunks exists but the result.
    """

    arrays, structure = jax.tree.flatten(chunks)

    def chunk_of(arrays, i):
        return structure.unflatten([jax.lax.dynamic_index_in_dim(x, i, keepdims=False) for x in arrays])

    @jax.custom_vjp
    def run(shared, arrays, live):
        one = jax.eval_shape(lambda: function(shared, chunk_of(arrays, 0)))

        def round_(i, found):
            return jax.lax.dynamic_update_index_in_dim(found, function(shared, chunk_of(arrays, i)), i, axis=0)

        return jax.lax.fori_loop(0, live, round_, jnp.zeros((len(arrays[0]), *one.shape), one.dtype))

    def forward(shared, arrays, live):
        return run(shared, arrays, live), (shared, arrays, live)

    def backward(saved, cotangent):
        shared, arrays, live = saved

        def round_(i, gradients):
            chunk = chunk_of(arrays, i)
            _, pull = jax.vjp(lambda shared: function(shared, chunk), shared)
            [gradient] = pull(jax.lax.dynamic_index_in_dim(cotangent, i, keepdims=False))
            return jax.tree.map(jnp.add, gradients, gradient)

        start = jax.tree.map(jnp.zeros_like, shared)
        return jax.lax.fori_loop(0, live, round_, start), None, None

    run.defvjp(forward, backward)
    return run(shared, arrays, live)
