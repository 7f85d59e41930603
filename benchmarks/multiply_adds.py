"""The matrix products and convolutions in a JAX program: the least work there is to do, and how long it alone takes."""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn


@dataclass(frozen=True)
class Product:
    """One product or convolution, which the program does `times` times."""

    equation: JaxprEqn
    times: float

    @property
    def multiply_adds(self) -> float:
        """Of one."""
        parameters = self.equation.params
        lhs, rhs = (variable.aval.shape for variable in self.equation.invars)
        if self.equation.primitive.name == "dot_general":
            (contracting, _), _ = parameters["dimension_numbers"]
            each = math.prod(lhs[axis] for axis in contracting)
        else:
            each = math.prod(rhs) / rhs[parameters["dimension_numbers"].rhs_spec[0]]
        return math.prod(self.equation.outvars[0].aval.shape) * each

    def seconds(self, repeats: int = 5) -> float:
        """Of one, by itself: the median."""
        equation = self.equation
        operands = [jnp.ones(variable.aval.shape, variable.aval.dtype) for variable in equation.invars]
        run = jax.jit(lambda *x: equation.primitive.bind(*x, **equation.params))
        jax.block_until_ready(run(*operands))
        measured = []
        for _ in range(repeats):
            start = time.perf_counter()
            jax.block_until_ready(run(*operands))
            measured.append(time.perf_counter() - start)
        return statistics.median(measured)


def products(function: Callable, *arguments: Any, rounds: int = 1) -> list[Product]:
    """Those of one call, equal ones together. A loop of unknown length counts as `rounds` rounds."""
    merged: dict[str, Product] = {}
    for product in _of(jax.make_jaxpr(function)(*arguments).jaxpr, 1, rounds):
        operands = [variable.aval for variable in product.equation.invars]
        key = f"{product.equation.primitive} {operands} {product.equation.params}"
        before = merged[key].times if key in merged else 0
        merged[key] = replace(product, times=before + product.times)
    return list(merged.values())


def total(work: Iterable[Product]) -> float:
    return sum(product.times * product.multiply_adds for product in work)


def seconds_alone(work: list[Product], share: float = 0.95) -> float:
    """How long the products take one by one, from the largest that make up `share` of the multiply-adds."""
    wanted, measured, spent = share * total(work), 0.0, 0.0
    for product in sorted(work, key=lambda p: -p.times * p.multiply_adds):
        if measured >= wanted:
            break
        measured += product.times * product.multiply_adds
        spent += product.times * product.seconds()
    return spent * total(work) / measured


def _of(jaxpr: Jaxpr, times: float, rounds: int) -> list[Product]:
    found = []
    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        if name in ("dot_general", "conv_general_dilated"):
            found.append(Product(equation, times))
        elif name != "pallas_call":  # a kernel of another platform, one of the forms that a program holds
            more = {"scan": parameters.get("length", 1), "while": rounds}.get(name, 1)
            for inner in _inner(parameters):
                found += _of(inner, times * more, rounds)
    return found


def _inner(parameters: Mapping[str, Any]) -> list[Jaxpr]:
    found = []
    for value in parameters.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, ClosedJaxpr):
                found.append(item.jaxpr)
            elif isinstance(item, Jaxpr):
                found.append(item)
    return found
