"""What a training step sees: images, masks and named objects, all of static shape.

Letters (B, H, W, G, T, E, …) are those of docs/method.md#letters. Masks are True on what is real.
"""

from dataclasses import dataclass

from jax.tree_util import register_dataclass
from jaxtyping import Array, Bool, Float, Int, UInt8
from numpy import ndarray


@register_dataclass
@dataclass(frozen=True)
class Objects:
    """The named boxes of each image, padded to G. What a slot holds where `valid` is False influences nothing."""

    boxes: Float[Array | ndarray, "B G 4"]  # (cx, cy, w, h) in [0, 1] of the unpadded image
    valid: Bool[Array | ndarray, "B G"]
    texts: Float[Array | ndarray, "B G E"]  # unit-length embedding of "a " + name
    tokens: Int[Array | ndarray, "B G T"]  # the name, ending in </s> (1), then padding (0)


@register_dataclass
@dataclass(frozen=True)
class Images:
    """Padded photographs. Pixels under a False mask influence nothing: the model zeroes them after normalising."""

    pixels: UInt8[Array | ndarray, "B H W 3"]  # RGB
    mask: Bool[Array | ndarray, "B H W"]  # True on the photograph, False on the padding right and below


@register_dataclass
@dataclass(frozen=True)
class Batch:
    images: Images
    objects: Objects
