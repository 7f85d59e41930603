"""Floating-point operations of the products of a traced program, for compilers that count none."""

import math
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, jaxprs_in_params


def products(program: Jaxpr | ClosedJaxpr) -> int:
    """Of matrix products and convolutions on all devices together, a multiplication and an addition each.

    As XLA counts, none in kernels, which may skip what they need not compute, and one round of a loop whose number of
    rounds is not known. Of a choice the larger branch; what is computed again in the backward pass counts again.
    """
    traced = program.jaxpr if isinstance(program, ClosedJaxpr) else program
    return sum(_of(equation) for equation in traced.eqns)


def _of(equation: JaxprEqn) -> int:
    name, given = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = given["dimension_numbers"]
        left = _shape(equation.invars[0])
        return 2 * _size(equation.outvars[0]) * math.prod(left[axis] for axis in contracted)
    if name == "conv_general_dilated":
        out_channels = _shape(equation.invars[1])[given["dimension_numbers"].rhs_spec[0]]
        return 2 * _size(equation.outvars[0]) * _size(equation.invars[1]) // out_channels
    if name == "pallas_call":
        return 0
    inner = [products(body) for body in jaxprs_in_params(given)]
    if name == "cond":
        return max(inner)
    if name == "scan":
        return given["length"] * sum(inner)
    if name == "shard_map":
        return math.prod(given["mesh"].shape[axis] for axis in given["newly_manual_axes"]) * sum(inner)
    return sum(inner)


def _shape(array: Any) -> tuple[int, ...]:
    return array.aval.shape


def _size(array: Any) -> int:
    return math.prod(_shape(array))
