"""Multi-scale deformable attention: each query reads a few points of a feature pyramid, bilinearly, and sums them.

One operation, three forms: `xla` (any platform), `pallas_gpu` and `pallas_tpu`, chosen when a program is lowered for
its platform; Pallas is imported then and not before. Each form has a `forward` and a `backward`; `reference` is the
definition that tests compare them with.

Method: docs/method.md#2-backbone-neck-encoder.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, partial
from importlib import import_module

import jax
from absl import logging
from jax.core import ShapedArray
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import batching, mlir
from jaxtyping import Array, Float

from opendet_jax.ops.deformable_attention import xla
from opendet_jax.ops.deformable_attention.reference import LevelShapes
from opendet_jax.ops.devices import on_each_device

__all__ = ["deformable_attention", "without_kernels"]

KERNELS = {"cuda": "pallas_gpu", "tpu": "pallas_tpu"}  # modules beside this one
_WITHOUT_KERNELS = ContextVar("without_kernels", default=False)


@contextmanager
def without_kernels() -> Iterator[None]:
    """What is traced here is XLA's form on every platform: kernels are bound to the jax that made them."""
    token = _WITHOUT_KERNELS.set(True)
    try:
        yield
    finally:
        _WITHOUT_KERNELS.reset(token)


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
    if _WITHOUT_KERNELS.get():
        return xla.forward(value, locations, weights, level_shapes=level_shapes)
    return _attention(value, level_shapes, locations, weights)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _attention(value, level_shapes: LevelShapes, locations, weights):
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


def _primitive(direction: str) -> Primitive:
    """What a traced program holds of the operation: shapes alone, until its platform is known.

    `lax.platform_dependent` would do without, but traces every platform's form, and so needs Pallas everywhere.
    """
    primitive = Primitive(f"deformable_attention_{direction}")
    primitive.multiple_results = True
    primitive.def_abstract_eval(_RESULTS[direction])
    primitive.def_impl(partial(_without_jit, direction))
    batching.primitive_batchers[primitive] = partial(_map, primitive)
    mlir.register_lowering(primitive, partial(_lower, direction, None))
    for platform in KERNELS:
        mlir.register_lowering(primitive, partial(_lower, direction, platform), platform=platform)
    return primitive


def _forward_results(value, locations, weights, *, level_shapes: LevelShapes):
    batch, queries, heads = locations.shape[:3]
    return [ShapedArray((batch, queries, heads * value.shape[-1]), value.dtype)]


def _backward_results(value, locations, weights, cotangent, *, level_shapes: LevelShapes):
    return [ShapedArray(x.shape, x.dtype) for x in (value, locations, weights)]


_RESULTS = {"forward": _forward_results, "backward": _backward_results}


def _without_jit(direction: str, *arrays, level_shapes: LevelShapes):
    """Under `jax.disable_jit`: XLA's operations, one by one."""
    return jax.tree.leaves(getattr(xla, direction)(*arrays, level_shapes=level_shapes))


def _map(primitive: Primitive, arrays, axes, *, level_shapes: LevelShapes):
    """Under vmap: what is mapped over are more images."""
    size = next(x.shape[axis] for x, axis in zip(arrays, axes, strict=True) if axis is not None)
    arrays = [batching.bdim_at_front(x, axis, size) for x, axis in zip(arrays, axes, strict=True)]
    results = primitive.bind(*(x.reshape(-1, *x.shape[2:]) for x in arrays), level_shapes=level_shapes)
    return [x.reshape(size, -1, *x.shape[1:]) for x in results], [0] * len(results)


def _lower(direction: str, platform: str | None, context, *operands, level_shapes: LevelShapes):
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in context.avals_in]
    traced = _traced(direction, platform, shapes, level_shapes)
    return mlir.lower_fun(jaxpr_as_fun(traced), multiple_results=True)(context, *operands)


def _traced(direction: str, platform: str | None, shapes, level_shapes: LevelShapes) -> ClosedJaxpr:
    """The platform's kernels, or XLA's operations where it has none or this jax no longer has what they are made of."""
    if platform is not None:
        try:
            kernels = import_module(f"{__name__}.{KERNELS[platform]}")
            return jax.make_jaxpr(partial(getattr(kernels, direction), level_shapes=level_shapes))(*shapes)
        except Exception as error:  # whatever a back end that changed may raise
            _say(platform, f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}")
    return jax.make_jaxpr(partial(getattr(xla, direction), level_shapes=level_shapes))(*shapes)


@cache
def _say(platform: str, reason: str) -> None:
    logging.warning(
        "deformable attention: jax %s cannot make the kernels for %s (%s); XLA's own operations do their work, slower",
        *(jax.__version__, platform, reason),
    )


_forward_p, _backward_p = _primitive("forward"), _primitive("backward")


# jit keeps the lowered programs: a model has tens of layers of few different shapes.
@partial(jax.jit, static_argnums=0)
def _forward(level_shapes: LevelShapes, value, locations, weights):
    return _forward_p.bind(value, locations, weights, level_shapes=level_shapes)[0]


@partial(jax.jit, static_argnums=0)
def _backward(level_shapes: LevelShapes, value, locations, weights, cotangent):
    return tuple(_backward_p.bind(value, locations, weights, cotangent, level_shapes=level_shapes))


def _save(value, level_shapes: LevelShapes, locations, weights):
    return _attention(value, level_shapes, locations, weights), (value, locations, weights)


def _pull(level_shapes: LevelShapes, saved, cotangent):
    return on_each_device(partial(_backward, level_shapes), *saved, cotangent)


_attention.defvjp(_save, _pull)
