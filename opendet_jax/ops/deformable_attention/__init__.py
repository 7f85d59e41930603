"""Multi-scale deformable attention: each query reads a few points of a feature pyramid, bilinearly, and sums them.

One operation, three forms: `xla` (any platform), `pallas_gpu` and `pallas_tpu`, chosen when a program is compiled for
its platform. Each form has a `forward` and a `backward`; `reference` is the definition that tests compare them with.

Method: docs/method.md#2-backbone-neck-encoder.
"""

from functools import partial

import jax
from jax import lax
from jaxtyping import Array, Float

from opendet_jax.ops.deformable_attention import pallas_gpu, pallas_tpu, xla
from opendet_jax.ops.deformable_attention.reference import LevelShapes
from opendet_jax.ops.devices import on_each_device

__all__ = ["deformable_attention"]


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def deformable_attention(
    value: Float[Array, "B S H d"],
    level_shapes: LevelShapes,
    locations: Float[Array, "B Q H L P 2"],
    weights: Float[Array, "B Q H L P"],
) -> Float[Array, "B Q Hd"]:
    """Σ over levels l and points p of weights[…, l, p] · value at locations[…, l, p], for each head.

    `level_shapes` are the static (h, w) of the L levels, whose cells are the S tokens, row by row. `locations` are
    (x, y) in [0, 1] of the padded level: u reads at u·w − ½ bilinearly, and cells outside the level count as zero.
    Sums in float32 whatever the dtype of `value`; the result has that dtype. On a TPU with bfloat16 values each share
    of a cell is rounded to bfloat16 too.

    In a program over several devices, under `jax.set_mesh(mesh)`, each works on its own images: see `ops/devices.py`.

    Raises:
      ValueError: the levels do not have S cells, or the arrays' shapes do not go together.
    """
    _check(value, level_shapes, locations, weights)
    return on_each_device(partial(_forward, level_shapes), value, locations, weights)


def _check(value, level_shapes: LevelShapes, locations, weights) -> None:
    cells = sum(h * w for h, w in level_shapes)
    if value.shape[1] != cells:
        raise ValueError(f"levels {level_shapes} have {cells} cells, value has {value.shape[1]} tokens")
    batch, _, heads, _ = value.shape
    wanted = (batch, locations.shape[1], heads, len(level_shapes), weights.shape[-1])
    if weights.shape != wanted or locations.shape != (*wanted, 2):
        raise ValueError(
            f"value {value.shape} on {len(level_shapes)} levels wants weights {wanted} and locations {(*wanted, 2)}; "
            f"they are {weights.shape} and {locations.shape}"
        )


# jit keeps the traces: a model has tens of layers of few different shapes, and every trace sees all three forms.
@partial(jax.jit, static_argnums=0)
def _forward(level_shapes: LevelShapes, value, locations, weights):
    forms = {"default": xla.forward, "cuda": pallas_gpu.forward, "tpu": pallas_tpu.forward}
    forms = {platform: partial(form, level_shapes=level_shapes) for platform, form in forms.items()}
    return lax.platform_dependent(value, locations, weights, **forms)


@partial(jax.jit, static_argnums=0)
def _backward(level_shapes: LevelShapes, value, locations, weights, cotangent):
    forms = {"default": xla.backward, "cuda": pallas_gpu.backward, "tpu": pallas_tpu.backward}
    forms = {platform: partial(form, level_shapes=level_shapes) for platform, form in forms.items()}
    return lax.platform_dependent(value, locations, weights, cotangent, **forms)


def _save(value, level_shapes: LevelShapes, locations, weights):
    return deformable_attention(value, level_shapes, locations, weights), (value, locations, weights)


def _pull(level_shapes: LevelShapes, saved, cotangent):
    return on_each_device(partial(_backward, level_shapes), *saved, cotangent)


deformable_attention.defvjp(_save, _pull)
