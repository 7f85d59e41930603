"""Bipartite matching of queries and objects, one-to-one and one-to-many.

Method: docs/method.md#8-matching.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax.nn import sigmoid
from jaxtyping import Array, Bool, Float, Int
from optax.assignment import hungarian_algorithm

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
    # serving as many as possible; more would only cost the float32 potentials precision. A padding column costs
    # the same everywhere: it takes what is left over.
    scale = 1.0 + jnp.max(jnp.abs(jnp.where(finite, cost, 0.0)), initial=0.0)
    cost = jnp.where(finite, cost, 2.0 * scale)
    cost = jnp.where(query_valid[:, None], cost, 4.0 * scale)
    cost = jnp.where(column_valid, cost, 0.0)

    rows, columns = hungarian_algorithm(cost)
    query = jnp.zeros(num_columns, rows.dtype).at[columns].set(rows)
    return jnp.where(column_valid & query_valid[query], query, -1)
