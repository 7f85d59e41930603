"""The real training step, at its full size, compiled for devices that may not be here; and what these tell each other,
read from the text of the compiled program.
"""

import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, jaxprs_in_params
from jax.sharding import Mesh

from opendet_jax.batch import Batch, Images, Objects
from opendet_jax.config import Config
from opendet_jax.errors import InputError
from opendet_jax.model.opendet import OpenDet
from opendet_jax.train.optimizer import abstract_state, make_optimizer
from opendet_jax.train.step import jit_step, make_train_step

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) (?:\(.*)?.*\{$")
_CALL = re.compile(r"(body|condition|to_apply|calls|\w+_computations?)=(\{[^}]*\}|%?[\w.\-]+)")
_NAME = re.compile(r"%?([\w.\-]+)")
_COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(KINDS)})(-start)?\(")
_ARRAY = re.compile(r"([a-z]+\d*)\[([\d,]*)\]")
# Devices that speak to each other: {{0,1},{2,3}}, or [groups,size]<=…, or axes of a mesh: mesh['a'=2,'b'=4] {'b'}.
_GROUPS = re.compile(
    r"replica_groups=(?:\{\}|\{\{(?P<listed>[\d,]+)\}|\[\d+,(?P<size>\d+)\]"
    r"|mesh\[(?P<mesh>[^]]*)\].*? \{(?P<axes>[^}]*)\})"
)
_AXIS = re.compile(r"'([^']+)'(?::\(\d+\)(\d+))?")  # a part of one: 'a':(before)size
_BITS = re.compile(r"\d+$")


class TooLargeError(InputError):
    """A program that needs more memory than its device has; `needed` in bytes, where the compiler says."""

    def __init__(self, message: str, needed: float | None):
        super().__init__(message)
        self.needed = needed


class Program(NamedTuple):
    """A compiled step and what is known of it without running it. Sizes are of one device, in bytes."""

    compiled: Any
    products: float  # operations of the traced program's products, an even share of all devices'
    state: Any  # its TrainState of shapes
    seconds: float  # of tracing and compiling

    def stored(self, part: str) -> int:
        """Of "params", "opt_state" or "average"."""
        leaves = jax.tree.leaves(getattr(self.state, part))
        return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)

    def memory(self) -> dict[str, int]:
        """What the step needs, by XLA's own account: what lies there before it, after it and in between."""
        found = self.compiled.memory_analysis()
        arguments, results = found.argument_size_in_bytes, found.output_size_in_bytes - found.alias_size_in_bytes
        return {
            "parameters": self.stored("params"),
            "optimizer": self.stored("opt_state"),
            "average": self.stored("average"),
            "arguments": arguments,
            "activations": found.temp_size_in_bytes,
            "code": found.generated_code_size_in_bytes,
            "peak": arguments + results + found.temp_size_in_bytes + found.generated_code_size_in_bytes,
        }

    def cost(self, name: str) -> float | None:
        """XLA's count of "flops" or "bytes accessed" on a device, a loop's rounds counted as it knows them (else one);
        None where its compiler does not count."""
        analysis = self.compiled.cost_analysis()
        return float(analysis[name]) if analysis and name in analysis else None


def largest_bucket(config: Config) -> tuple[int, int]:
    """(H, W) of the padded pictures that need most."""
    return max(config.data.buckets, key=math.prod)


def abstract_batch(config: Config) -> Batch:
    """Shapes of a batch of the largest bucket."""
    of: Any = jax.ShapeDtypeStruct
    data = config.data
    height, width = largest_bucket(config)
    images, slots = data.batch_size, (data.batch_size, data.max_objects)
    return Batch(
        Images(of((images, height, width, 3), jnp.uint8), of((images, height, width), jnp.bool_)),
        Objects(
            of((*slots, 4), jnp.float32),
            of(slots, jnp.bool_),
            of((*slots, config.model.text_width), jnp.float32),
            of((*slots, data.max_name_tokens), jnp.int32),
        ),
    )


def compile_step(config: Config, mesh: Mesh, compiler_options: dict[str, Any] | None = None) -> Program:
    """Traces, lowers and compiles the step for the mesh's devices.

    Raises:
      TooLargeError: the compiler found that a device's memory does not suffice.
    """
    model, optimizer = OpenDet(config.model, config.ablation), make_optimizer(config.optimizer, config.ablation)
    start = time.perf_counter()
    state = abstract_state(model, optimizer, config, mesh)
    with jax.set_mesh(mesh):
        step = jit_step(make_train_step(model, optimizer, config), state, mesh)
        try:
            traced = step.trace(state, abstract_batch(config))
            compiled = traced.lower().compile(compiler_options)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            used = re.search(r"Used ([\d.]+)([KMG]) of ([\d.]+)[KMG]", str(error))
            needed = float(used[1]) * {"K": 2**10, "M": 2**20, "G": 2**30}[used[2]] if used else None
            raise TooLargeError(f"does not fit: {used[0] if used else str(error)[:300]}", needed) from error
    seconds = time.perf_counter() - start
    return Program(compiled, products(traced.jaxpr) / mesh.size, state, seconds)


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


class Array(NamedTuple):
    """The type of an array in a program's text."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        bits = _BITS.search(self.dtype)
        return math.prod(self.shape) * (max(8, int(bits[0])) if bits else 8) // 8


class Collective(NamedTuple):
    """One instruction. In a loop it is carried out once a round; how many rounds there are a program does not say."""

    kind: str
    results: tuple[Array, ...]  # on each device
    group: int  # devices that take part
    in_loop: bool

    @property
    def bytes(self) -> int:
        """Of its larger side, on a device: of what is summed, gathered, scattered or sent."""
        size = sum(array.bytes for array in self.results)
        return size * self.group if self.kind == "reduce-scatter" else size

    @property
    def sent(self) -> float:
        """Bytes that a device must send at least: those of a ring."""
        if self.kind == "collective-permute":
            return float(self.bytes)
        share = (self.group - 1) / self.group
        return self.bytes * share * (2 if self.kind == "all-reduce" else 1)


def collectives(program: str, devices: int) -> list[Collective]:
    """Those of a program's text in which more than one of its `devices` take part."""
    bodies, calls, loops = _read(program)
    inside = _reached(loops, calls)
    found = []
    for name, lines in bodies.items():
        for line in lines:
            match = _COLLECTIVE.search(line)
            if match:
                kind, started = match[2], bool(match[3])
                group = _group(line, devices) if kind != "collective-permute" else 2
                if group > 1:
                    found.append(Collective(kind, _results(match[1], kind, started), group, name in inside))
    return found


def summary(found: Sequence[Collective]) -> dict[str, dict[str, int | float]]:
    """Of each kind the number of instructions, how many of them are in loops, and their bytes on a device."""
    kinds = {kind: [c for c in found if c.kind == kind] for kind in KINDS}
    return {
        kind: {
            "count": len(these),
            "in_loops": sum(c.in_loop for c in these),
            "bytes": sum(c.bytes for c in these),
            "bytes_sent": sum(c.sent for c in these),
        }
        for kind, these in kinds.items()
        if these
    }


def _read(program: str) -> tuple[dict[str, list[str]], dict[str, set[str]], set[str]]:
    """Of a program's text: the lines of each computation, which others each one uses, and the bodies of loops."""
    bodies: dict[str, list[str]] = {}
    calls: dict[str, set[str]] = {}
    loops: set[str] = set()
    name = ""
    for line in program.splitlines():
        if line.endswith("{") and not line.startswith(" ") and (match := _COMPUTATION.match(line)):
            name = match[1]
            bodies[name], calls[name] = [], set()
        elif name:
            bodies[name].append(line)
            for how, names in _CALL.findall(line):
                used = set(_NAME.findall(names))
                calls[name] |= used
                if how in ("body", "condition"):
                    loops |= used
    return bodies, calls, loops


def _reached(start: set[str], calls: Mapping[str, set[str]]) -> set[str]:
    found, waiting = set(), list(start)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += calls.get(name, ())
    return found


def _results(text: str, kind: str, started: bool) -> tuple[Array, ...]:
    arrays = tuple(_arrays(text))
    if started and kind in ("all-gather", "reduce-scatter"):
        return arrays[len(arrays) // 2 :]  # operands, then results
    if started and kind == "collective-permute":
        return arrays[1:2]
    return arrays


def _arrays(text: str) -> Iterator[Array]:
    text = re.sub(r"\{[^{}]*\}", "", text)  # layouts
    for dtype, shape in _ARRAY.findall(text):
        yield Array(dtype, tuple(int(size) for size in shape.split(",") if size))


def _group(line: str, devices: int) -> int:
    if "replica_groups=" not in line:
        return devices
    match = _GROUPS.search(line)
    if not match:
        raise ValueError(f"a form of replica groups that is not known: {line.partition('replica_groups=')[2][:200]}")
    if match["mesh"] is not None:
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", match["mesh"])}
        return math.prod(int(part) if part else sizes[name] for name, part in _AXIS.findall(match["axes"]))
    if match["listed"] is not None:
        return len(match["listed"].split(","))
    return int(match["size"]) if match["size"] else devices
