"""Multi-scale tokens: four feature levels laid out as one row of S tokens."""

from flax import struct
from jaxtyping import Array, Bool, Float

NUM_LEVELS = 4  # L: strides 8, 16, 32 and 64


@struct.dataclass
class Pyramid:
    """Level 0 (the finest) first, each level row by row. Tokens that are not `valid` influence no valid one."""

    tokens: Float[Array, "B S D"]
    valid: Bool[Array, "B S"]  # True where the cell lies on the photograph
    valid_ratios: Float[Array, "B L 2"]  # (w, h): the photograph's share of each padded level
    level_shapes: tuple[tuple[int, int], ...] = struct.field(pytree_node=False)  # (h, w) of each level
