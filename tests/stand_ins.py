"""What the first half of a model says, for models whose second half is made up."""

import jax.numpy as jnp

from opendet_jax.model.encoder import Memory
from opendet_jax.model.neck import Features
from opendet_jax.model.query_selection import Queries


def encoded(boxes, objectness, valid) -> tuple[Features, Memory, Queries]:
    """Queries [B, Q] as they are given, and pyramids of zeros."""
    batch, slots = valid.shape
    zeros, ratios = jnp.zeros((batch, 4, 1)), jnp.ones((batch, 4, 2))
    common = {"tokens": zeros, "valid": zeros[..., 0] > 0, "valid_ratios": ratios}
    features = Features(**common, level_shapes=((1, 1),) * 4, positions=zeros)
    queries = Queries(jnp.zeros((batch, slots, 1)), boxes, objectness, valid, jnp.zeros((batch, slots), jnp.int32))
    return features, Memory(**common, level_shapes=((1, 1),) * 4), queries
