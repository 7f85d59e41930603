"""Bipartite matching of queries and objects, one-to-one and one-to-many.

Method: docs/method.md#8-matching.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax.nn import sigmoid
from jaxtyping import Array, Bool, Float, Int

from opendet_jax.ops.boxes import giou, to_corners
from opendet_jax.ops.devices import on_each_device

LOG_EPS = 1e-8


class Mode(NamedTuple):
    """How a set of queries is matched."""

    copies: int  # queries an object gets
    alignment_weight: float  # w_c
    alpha: float  # of both focal terms of the cost; not that of the losses


ONE_TO_ONE = Mode(copies=1, alignment_weight=2.0, alpha=0.25)
ONE_TO_MANY = Mode(copies=2, alignment_weight=0.2, alpha=2.0)
L1_WEIGHT = 5.0
GIOU_WEIGHT = 2.0
OBJECTNESS_WEIGHT = 1.0


@struct.dataclass
class Predictions:
    """What sets of queries say, with any leading axes (layers, images): of a decoder layer, or the encoder's tokens."""

    boxes: Float[Array, "*sets Q 4"]
    objectness: Float[Array, "*sets Q"]  # logit z of p
    alignment: Float[Array, "*sets Q G"]  # logit S
    valid: Bool[Array, "*sets Q"]


@struct.dataclass
class Targets:
    """The objects of a batch."""

    boxes: Float[Array, "B G 4"]
    valid: Bool[Array, "B G"]
    texts: Float[Array, "B G E"]
    tokens: Int[Array, "B G T"]


@struct.dataclass
class Matches:
    """The same pairs seen from both sides; −1 = none."""

    query: Int[Array, "*sets copies G"]
    object: Int[Array, "*sets Q"]


class _Search(NamedTuple):
    """The growing tree of shortest paths from a column, over queries and the columns that have them."""

    column: Int[Array, ""]  # to go on from; −1: a free query is reached
    length: Float[Array, ""]  # of the path to it
    reach: Float[Array, "Q"]  # length of the shortest path known to each query
    before: Int[Array, "Q"]  # the column before the query on that path
    seen: Bool[Array, "Q"]
    visited: Bool[Array, "M"]
    rank: Int[Array, "Q"]  # place in the list of queries not seen
    left: Int[Array, ""]  # queries in that list
    query: Int[Array, ""]  # the last one seen


def _focal_cost(logit: Float[Array, "*n"], alpha: float) -> Float[Array, "*n"]:
    """C_focal = α(1−p)²(−log(p + 1e-8)) − (1−α)p²(−log(1−p + 1e-8)), with 1 − p = σ(−logit) to keep its digits."""
    p, q = sigmoid(logit), sigmoid(-logit)
    return alpha * q**2 * -jnp.log(p + LOG_EPS) - (1 - alpha) * p**2 * -jnp.log(q + LOG_EPS)


def matching_cost(
    boxes: Float[Array, "Q 4"],
    objectness: Float[Array, "Q"],
    alignment: Float[Array, "Q G"],
    object_boxes: Float[Array, "G 4"],
    mode: Mode,
) -> Float[Array, "Q G"]:
    """w_c·C_focal(σ(S); α) + 5·L1 − 2·GIoU + C_focal(σ(z); α) of every query and object of one image.

    The last term prefers confident queries: it is the same for every object.
    """
    l1 = jnp.abs(boxes[:, None] - object_boxes).sum(-1)
    overlap = giou(to_corners(boxes)[:, None], to_corners(object_boxes)[None])
    return (
        mode.alignment_weight * _focal_cost(alignment, mode.alpha)
        + L1_WEIGHT * l1
        - GIOU_WEIGHT * overlap
        + OBJECTNESS_WEIGHT * _focal_cost(objectness, mode.alpha)[:, None]
    )


def match(predictions: Predictions, targets: Targets, mode: Mode) -> Matches:
    """Matches every layer and image on its own; `predictions` has one leading axis of layers. No gradient."""

    def one_image(predictions, boxes, valid):
        cost = matching_cost(predictions.boxes, predictions.objectness, predictions.alignment, boxes, mode)
        query = assign(jnp.tile(cost, (1, mode.copies)), predictions.valid, jnp.tile(valid, mode.copies))
        num_queries, num_objects = cost.shape
        of_query = jnp.full(num_queries, -1, query.dtype)
        slots = jnp.where(query >= 0, query, num_queries)  # out of bounds, dropped
        of_query = of_query.at[slots].set(jnp.tile(jnp.arange(num_objects), mode.copies), mode="drop")
        return query.reshape(mode.copies, num_objects), of_query

    over_layers = jax.vmap(one_image, in_axes=(0, None, None))
    images_first = jax.tree.map(lambda x: jax.lax.stop_gradient(x).swapaxes(0, 1), predictions)
    query, of_query = on_each_device(jax.vmap(over_layers), images_first, targets.boxes, targets.valid)
    return Matches(query=query.swapaxes(0, 1), object=of_query.swapaxes(0, 1))


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
    # serving as many as possible; more would only cost the float32 potentials precision.
    highest = jnp.max(jnp.where(finite, cost, 0.0), initial=0.0)
    margin = 1.0 + highest / 8.0
    cost = jnp.where(finite, cost, highest + margin)
    cost = jnp.where(query_valid[:, None], cost, highest + 2.0 * margin)

    query = shortest_augmenting_paths(cost, column_valid)
    return jnp.where(column_valid & query_valid[query], query, -1)


def shortest_augmenting_paths(cost: Float[Array, "Q M"], wanted: Bool[Array, "M"]) -> Int[Array, "M"]:
    """The queries of the wanted columns at the least total cost, Q ≥ M; of other columns, query 0.

    Jonker and Volgenant's algorithm as scipy.optimize.linear_sum_assignment has it (D. F. Crouse, On implementing 2D
    rectangular assignment algorithms, 2016), equal costs included: a column after the other gets a query, by the
    shortest path that gives other queries to those before it. Written here because optax.assignment looks at one query
    a round, gives queries to padding too, and among equal costs chooses otherwise.
    """
    num_queries, num_columns = cost.shape
    by_column = cost.T
    order = jnp.argsort(~wanted, stable=True)

    def shortest_path(first, u, v, owner):
        """The search from column `first` to a free query."""

        def step(search: _Search) -> _Search:
            reach = search.length + by_column[search.column] - u[search.column] - v
            better = ~search.seen & (reach < search.reach)
            reach = jnp.where(better, reach, search.reach)
            before = jnp.where(better, search.column, search.before)
            length = jnp.min(jnp.where(search.seen, jnp.inf, reach))
            # Of equals, scipy takes the last free query in its list of those not seen, else the first.
            free = owner < 0
            among = jnp.where(free, 2 * num_queries + search.rank, num_queries - search.rank)
            query = jnp.argmax(jnp.where(~search.seen & (reach == length), among, -1)).astype(jnp.int32)
            # The last of the list takes the place of the one that leaves it.
            rank = jnp.where(search.rank == search.left - 1, search.rank[query], search.rank)
            return _Search(
                column=jnp.where(free[query], -1, owner[query]),
                length=length,
                reach=reach,
                before=before,
                seen=search.seen.at[query].set(True),
                visited=search.visited.at[search.column].set(True),
                rank=rank,
                left=search.left - 1,
                query=query,
            )

        start = _Search(
            column=first,
            length=jnp.float32(0.0),
            reach=jnp.full(num_queries, jnp.inf),
            before=jnp.full(num_queries, -1, jnp.int32),
            seen=jnp.zeros(num_queries, bool),
            visited=jnp.zeros(num_columns, bool),
            rank=jnp.arange(num_queries - 1, -1, -1, jnp.int32),
            left=jnp.int32(num_queries),
            query=jnp.int32(0),
        )
        return jax.lax.while_loop(lambda search: search.column >= 0, step, start)

    def serve(number, state):
        u, v, owner, query_of = state
        first = order[number].astype(jnp.int32)
        found = shortest_path(first, u, v, owner)
        others = found.visited & (jnp.arange(num_columns) != first)
        u = jnp.where(others, u + found.length - found.reach[query_of], u).at[first].add(found.length)
        v = jnp.where(found.seen, v + found.reach - found.length, v)

        def give(state):
            """The path backwards: each of its columns takes the query that was found from it."""
            query, owner, query_of, _ = state
            column = found.before[query]
            return query_of[column], owner.at[query].set(column), query_of.at[column].set(query), column == first

        path = (found.query, owner, query_of, jnp.bool_(False))
        _, owner, query_of, _ = jax.lax.while_loop(lambda state: ~state[-1], give, path)
        return u, v, owner, query_of

    nobody = jnp.full(num_queries, -1, jnp.int32)
    start = (jnp.zeros(num_columns), jnp.zeros(num_queries), nobody, jnp.zeros(num_columns, jnp.int32))
    *_, query_of = jax.lax.fori_loop(0, wanted.sum(), serve, start)
    return query_of
