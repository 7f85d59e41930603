"""Everything a training step changes."""

from typing import Any

import optax
from flax import struct
from jaxtyping import Array, Int


@struct.dataclass
class TrainState:
    step: Int[Array, ""]  # optimizer steps taken
    params: dict[str, Any]
    opt_state: optax.OptState
