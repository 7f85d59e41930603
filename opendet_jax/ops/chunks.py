"""Token losses for many rows of which few are real, a chunk at a time: of names, and of the tokens of names."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

# (prompts [R, E], tokens [R, T], key) → negative log-likelihood [R, T] of each token, 0 on padding
TokenLosses = Callable[[Float[Array, "R E"], Int[Array, "R T"], PRNGKeyArray], Float[Array, "R T"]]

CHUNK = 64


def real_token_losses(
    token_losses: TokenLosses,
    prompts: Float[Array, "B R E"],
    tokens: Int[Array, "B R T"],
    real: Bool[Array, "B R"],
    key: PRNGKeyArray,
    shards: int = 1,
    chunk: int = CHUNK,
) -> Float[Array, "B R T"]:
    """Token losses of the real rows, 0 elsewhere; exact, and rows that are not real cost nothing.

    Real rows are moved to the front, and only the chunks that hold one are computed, forward and (again) backward:
    no array over all rows and the vocabulary exists. `shards` is the number of devices over which B is split: rows
    stay on theirs, and a chunk takes `chunk` rows of each.
    """
    batch, rows, _ = prompts.shape
    per_shard = batch // shards * rows
    order = jnp.argsort(~real.reshape(shards, per_shard), axis=1, stable=True)
    chunks = -(-per_shard // chunk)

    def arrange(x):
        x = jnp.take_along_axis(x.reshape(shards, per_shard, -1), order[..., None], axis=1)
        return jnp.pad(x, ((0, 0), (0, chunks * chunk - per_shard), (0, 0)), constant_values=1)

    # Ones are harmless in the places of rows that are not real: a prompt that can be normalised, tokens </s>.
    prompts = jnp.where(real[..., None], prompts.astype(jnp.float32), 1.0)
    tokens = jnp.where(real[..., None], tokens, 1)
    live = -(-real.reshape(shards, per_shard).sum(1).max() // chunk)
    losses = _live_chunks(token_losses, arrange(prompts), arrange(tokens), key, live, chunk)
    back = jnp.argsort(order, axis=1)[..., None]
    losses = jnp.take_along_axis(losses, back, axis=1).reshape(tokens.shape)
    return jnp.where(real[..., None], losses, 0.0)


def _live_chunks(
    token_losses: TokenLosses,
    prompts: Float[Array, "shards P E"],
    tokens: Int[Array, "shards P T"],
    key: PRNGKeyArray,
    live: Int[Array, ""],
    chunk: int,
) -> Float[Array, "shards P T"]:
    """The first `live` chunks by a loop of that many rounds, in both directions; zeros after them.

    Reverse differentiation of a loop of unknown length is not defined by JAX: here each round's is taken by itself.
    """

    def take(x, i):
        x = jax.lax.dynamic_slice_in_dim(x, i * chunk, chunk, axis=1)
        return x.reshape(-1, x.shape[-1])

    def put(x, i, rows):
        rows = rows.reshape(x.shape[0], chunk, x.shape[-1])
        return jax.lax.dynamic_update_slice_in_dim(x, rows, i * chunk, axis=1)

    # The parameters hidden in `token_losses` become arguments, `weights`, so that they can have gradients.
    call, weights = jax.closure_convert(token_losses, take(prompts, 0), take(tokens, 0), key)

    @jax.custom_vjp
    def run(prompts, weights, tokens, key, live):
        def round_(i, losses):
            rows = call(take(prompts, i), take(tokens, i), jax.random.fold_in(key, i), *weights)
            return put(losses, i, rows.astype(jnp.float32))

        return jax.lax.fori_loop(0, live, round_, jnp.zeros(tokens.shape, jnp.float32))

    def forward(prompts, weights, tokens, key, live):
        return run(prompts, weights, tokens, key, live), (prompts, weights, tokens, key, live)

    def backward(saved, cotangent):
        prompts, weights, tokens, key, live = saved

        def round_(i, gradients):
            of_prompts, of_weights = gradients

            def rows(prompts, weights):
                losses = call(prompts, take(tokens, i), jax.random.fold_in(key, i), *weights)
                return losses.astype(jnp.float32)

            _, pull = jax.vjp(rows, take(prompts, i), weights)
            for_prompts, for_weights = pull(take(cotangent, i))
            return put(of_prompts, i, for_prompts), jax.tree.map(jnp.add, of_weights, for_weights)

        start = jnp.zeros_like(prompts), jax.tree.map(jnp.zeros_like, weights)
        of_prompts, of_weights = jax.lax.fori_loop(0, live, round_, start)
        return of_prompts, of_weights, None, None, None

    run.defvjp(forward, backward)
    return run(prompts, weights, tokens, key, live)
