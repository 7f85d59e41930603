"""Layers whose activations are computed again in the backward pass instead of kept: less memory, more time."""

from typing import Literal

import flax.linen as nn
import jax

from opendet_jax.config import ModelConfig

Remat = Literal["no", "nothing", "products"]  # whether layers are computed again, and what of them is kept


def remat_policy(config: ModelConfig) -> Remat:
    return config.remat_keeps if config.remat else "no"


def recomputed(layer: type[nn.Module], remat: Remat, static_argnums: tuple[int, ...] = ()) -> type[nn.Module]:
    """`layer`, of which the backward pass has its input and, with "products", the results of its matrix products.

    `static_argnums`: of its call, the module being number 0.
    """
    if remat == "no":
        return layer
    policy = jax.checkpoint_policies.dots_saveable if remat == "products" else None
    return nn.remat(layer, policy=policy, static_argnums=static_argnums)
