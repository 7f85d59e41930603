"""Gradients of a batch that is too large for the memory: part after part, summed."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from opendet_jax.batch import Batch

Gradients = Callable[[Any, Batch, Any], tuple[dict[str, Any], Any]]  # (params, batch, key) → (loss terms, gradients)


def accumulated(gradients: Gradients, parts: int) -> Gradients:
    """`gradients` of a batch cut into `parts` equal ones: the memory of one, and a sum of all.

    A part weighs as much as it has objects (at least one), so that what is a sum over objects divided by their number
    is so over the whole batch. What is divided by something else (matched pairs, images with objects, groups of
    denoising queries) is so within a part. Each part has randomness of its own.
    """
    if parts == 1:
        return gradients

    def of_all(params, batch: Batch, key) -> tuple[dict[str, Any], Any]:
        objects = _by_part(batch.objects.valid, parts).sum((0, 2))
        weights = jnp.maximum(objects, 1) / jnp.maximum(objects.sum(), 1)

        def one(number):
            part = jax.tree.map(
                lambda x: jax.lax.dynamic_index_in_dim(_by_part(x, parts), number, axis=1, keepdims=False), batch
            )
            found = gradients(params, part, jax.random.fold_in(key, number))
            return jax.tree.map(lambda x: weights[number] * x, found)

        def add(number, sums):
            return jax.tree.map(jnp.add, sums, one(number))

        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, 0))
        return jax.lax.fori_loop(0, parts, add, nothing)

    return of_all


def _by_part(x: Any, parts: int) -> jax.Array:
    """[B, …] → [B / parts, parts, …]. Every parts-th image goes to the same part: where B is split over devices, each
    keeps its own images."""
    return jnp.asarray(x).reshape(-1, parts, *x.shape[1:])
