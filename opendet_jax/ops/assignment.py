"""Optimal assignment of queries to columns (objects, or copies of objects) under masks.

Method: docs/method.md#8-matching.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
from optax.assignment import hungarian_algorithm


def assign(cost: Float[Array, "Q M"], query_valid: Bool[Array, "Q"], column_valid: Bool[Array, "M"]) -> Int[Array, "M"]:
    """The query of each column, each query at most once, at the least total cost; −1 where the column is invalid.

    When valid columns outnumber valid queries, the cheapest choice of columns is served and the others get −1.
    A cost that is not finite counts as worse than every finite one.
    """
    num_queries, num_columns = cost.shape
    missing = max(num_columns - num_queries, 0)  # with as many rows as columns, no column competes with padding
    cost = jnp.pad(cost, ((0, missing), (0, 0)))
    query_valid = jnp.pad(query_valid, (0, missing))

    finite = query_valid[:, None] & column_valid & jnp.isfinite(cost)
    # Every served column saves the constant of an invalid query, so a constant above all costs is enough for
    # serving as many as possible; more would only cost the float32 potentials precision. A padding column costs
    # the same everywhere: it takes what is left over.
    scale = 1.0 + jnp.max(jnp.abs(jnp.where(finite, cost, 0.0)), initial=0.0)
    cost = jnp.where(finite, cost, 2.0 * scale)
    cost = jnp.where(query_valid[:, None], cost, 4.0 * scale)
    cost = jnp.where(column_valid, cost, 0.0)

    rows, columns = hungarian_algorithm(cost)
    query = jnp.zeros(num_columns, rows.dtype).at[columns].set(rows)
    return jnp.where(column_valid & query_valid[query], query, -1)
