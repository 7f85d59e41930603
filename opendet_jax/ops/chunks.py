"""Token losses for many rows of which few are real, a chunk at a time: of names, and of the tokens of names.

Method: docs/method.md#7-object-name-generator.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int, Key

from opendet_jax.ops.devices import on_each_device

# (prompts [R, E], tokens [R, T], keys [R] or None) → negative log-likelihood [R, T] of each token, 0 on padding.
# All arrays that it uses are bound to it, so that they can have gradients and be handed to each device.
TokenLosses = Partial

CHUNK = 64


def real_token_losses(
    token_losses: TokenLosses,
    prompts: Float[Array, "B R E"],
    tokens: Int[Array, "B R T"],
    real: Bool[Array, "B R"],
    keys: Key[Array, "B R"] | None = None,
    chunk: int = CHUNK,
) -> Float[Array, "B R T"]:
    """Token losses of the real rows, 0 elsewhere; exact, and rows that are not real cost nothing.

    Real rows are moved to the front, and only the chunks that hold one are computed, forward and (again) backward:
    no array over all rows and the vocabulary exists. Where B is split over devices, each does this with its own rows.
    What `token_losses` says of a row may depend on that row alone, its key included, not on its place among others.
    """
    # Ones are harmless in the places of rows that are not real: a prompt that can be normalised, tokens </s>.
    prompts = jnp.where(real[..., None], prompts.astype(jnp.float32), 1.0)
    tokens = jnp.where(real[..., None], tokens, 1)
    words = None if keys is None else jax.random.key_data(keys)
    own = partial(_own_rows, chunk)
    return on_each_device(own, prompts, tokens, words, real, shared=[token_losses], xla_splits_rest=True)


def _own_rows(chunk: int, token_losses: TokenLosses, prompts, tokens, words, real) -> Float[Array, "B R T"]:
    """The losses of this device's rows."""
    flat = real.reshape(-1)
    order = jnp.argsort(~flat, stable=True)
    chunks = -(-flat.size // chunk)

    def arrange(x):
        x = jnp.take(x.reshape(flat.size, *x.shape[2:]), order, axis=0)
        x = jnp.pad(x, ((0, chunks * chunk - flat.size), *[(0, 0)] * (x.ndim - 1)), constant_values=1)
        return x.reshape(chunks, chunk, *x.shape[1:])

    prompts, others = arrange(prompts), jax.tree.map(arrange, (tokens, words))
    live = -(-flat.sum() // chunk)
    losses = _live_chunks(token_losses, prompts, others, live)
    back = jnp.argsort(order)
    losses = jnp.take(losses.reshape(chunks * chunk, -1), back, axis=0).reshape(tokens.shape)
    return jnp.where(real[..., None], losses, 0.0)


def _live_chunks(token_losses: TokenLosses, prompts: Float[Array, "chunks r E"], others: Any, live: Int[Array, ""]):
    """The losses [chunks, r, T] of the first `live` chunks by a loop of that many rounds, in both directions; zeros
    after them.

    Reverse differentiation of a loop of unknown length is not defined by JAX: here each round's is taken by itself.
    """

    def take(tree, i):
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), tree)

    def call(token_losses, prompts, others):
        tokens, words = others
        keys = None if words is None else jax.random.wrap_key_data(words)
        return token_losses(prompts, tokens, keys).astype(jnp.float32)

    @jax.custom_vjp
    def run(token_losses, prompts, others, live):
        def round_(i, losses):
            rows = call(token_losses, take(prompts, i), take(others, i))
            return jax.lax.dynamic_update_index_in_dim(losses, rows, i, axis=0)

        return jax.lax.fori_loop(0, live, round_, jnp.zeros(others[0].shape, jnp.float32))

    def forward(token_losses, prompts, others, live):
        return run(token_losses, prompts, others, live), (token_losses, prompts, others, live)

    def backward(saved, cotangent):
        token_losses, prompts, others, live = saved

        def round_(i, gradients):
            of_weights, of_prompts = gradients
            chosen = take(others, i)
            _, pull = jax.vjp(lambda f, x: call(f, x, chosen), token_losses, take(prompts, i))
            for_weights, for_prompts = pull(take(cotangent, i))
            of_prompts = jax.lax.dynamic_update_index_in_dim(of_prompts, for_prompts, i, axis=0)
            return jax.tree.map(jnp.add, of_weights, for_weights), of_prompts

        start = jax.tree.map(jnp.zeros_like, (token_losses, prompts))
        of_weights, of_prompts = jax.lax.fori_loop(0, live, round_, start)
        return of_weights, of_prompts, None, None

    run.defvjp(forward, backward)
    return run(token_losses, prompts, others, live)
