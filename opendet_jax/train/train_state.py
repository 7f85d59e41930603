"""Everything a training step changes."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh

from opendet_jax.config import Config
from opendet_jax.model.opendet import OpenDet, init_params
from opendet_jax.parallel.sharding import partition


@struct.dataclass
class TrainState:
    """Arrays; or, in the same places, their shapes or shardings."""

    step: Any  # Int[Array, ""]: steps taken
    params: Any  # dict[str, Any]
    opt_state: optax.OptState
    refused: Any = struct.field(default_factory=lambda: jnp.zeros((), jnp.int32))  # Int[Array, ""]: updates, finite.py
    average: Any = None  # dict[str, Any]: moving average of `params`, where train.ema is not 0

    @property
    def evaluated(self) -> dict[str, Any]:
        """The parameters that are evaluated, and the model that training makes."""
        return self.params if self.average is None else self.average


def fresh_state(params: dict[str, Any], optimizer: optax.GradientTransformation, config: Config) -> TrainState:
    """The state of step 0."""
    average = jax.tree.map(jnp.copy, params) if config.train.ema else None
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), average=average)


def abstract_state(model: OpenDet, optimizer: optax.GradientTransformation, config: Config, mesh: Mesh) -> Any:
    """A TrainState of shapes, types and shardings in place of arrays: what a checkpoint is restored into."""
    params = jax.eval_shape(partial(init_params, model), jax.random.key(0))
    shapes = jax.eval_shape(partial(fresh_state, optimizer=optimizer, config=config), params)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        partition(shapes, mesh),
    )
