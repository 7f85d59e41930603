"""Compiles deformable attention for machines that are not here, and prints the memory it would take beside XLA's form.

    make compile-check

Compilation goes to machine code and finds what lowering alone does not: fast memory that does not suffice, layouts
without an instruction. Nothing is run. The command fails if a kernel does not compile, is missing from the program or
takes more memory than XLA's form, or if a program over several devices communicates.
"""

import argparse
import re
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from opendet_jax.ops.deformable_attention import deformable_attention, xla
from opendet_jax.ops.deformable_attention.reference import LevelShapes
from opendet_jax.scaling.machines import describe

HEADS, WIDTH = 8, 32
PARTS = ("forward", "with gradients")
KERNELS = {("H100", "forward"): 1, ("H100", "with gradients"): 2, ("v5e", "forward"): 1, ("v5e", "with gradients"): 3}
KERNEL = r'custom_call_target="(__gpu\$xla\.gpu\.triton|triton_kernel_call_ffi|tpu_custom_call)"'
COLLECTIVE = r" (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(-start)?\("


class Case(NamedTuple):
    """One use of the operation in the model."""

    name: str
    levels: LevelShapes
    points: int
    queries: int  # 0: every token is one
    dtype: type

    def arguments(self, batch: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Value, locations, weights and cotangent."""
        tokens = sum(h * w for h, w in self.levels)
        queries = self.queries or tokens
        points = (batch, queries, HEADS, len(self.levels), self.points)
        return (
            jax.ShapeDtypeStruct((batch, tokens, HEADS, WIDTH), self.dtype),
            jax.ShapeDtypeStruct((*points, 2), jnp.float32),
            jax.ShapeDtypeStruct(points, jnp.float32),
            jax.ShapeDtypeStruct((batch, queries, HEADS * WIDTH), self.dtype),
        )


SMALL = ((60, 80), (30, 40), (15, 20), (8, 10))  # 480 × 640: 6380 tokens
LARGE = ((100, 168), (50, 84), (25, 42), (13, 21))  # 800 × 1344: 22323 tokens
CASES = (
    Case("encoder, 480×640", SMALL, 4, 0, jnp.float32),
    Case("encoder, 800×1344", LARGE, 4, 0, jnp.float32),
    Case("encoder, 800×1344", LARGE, 4, 0, jnp.bfloat16),
    Case("decoder, 900 queries, 800×1344", LARGE, 4, 900, jnp.float32),
    Case("distiller, 900 queries, 16 points, 800×1344", LARGE, 16, 900, jnp.bfloat16),
)


def kernels(levels: LevelShapes) -> tuple[Callable, Callable]:
    """The public operation: forward alone, and with all its gradients."""

    def forward(value, locations, weights):
        return deformable_attention(value, levels, locations, weights)

    def both(value, locations, weights, cotangent):
        out, pull = jax.vjp(forward, value, locations, weights)
        return out, *pull(cotangent)

    return forward, both


def plain(levels: LevelShapes) -> tuple[Callable, Callable]:
    """The same in XLA's own operations."""
    forward, backward = (partial(form, level_shapes=levels) for form in (xla.forward, xla.backward))
    return forward, lambda *arrays: (forward(*arrays[:3]), *backward(*arrays))


def compiled(function: Callable, arguments: Sequence[jax.ShapeDtypeStruct], devices: Sequence) -> tuple[Any, float]:
    """The program for `devices`, images split over them, and the seconds its compilation took."""
    mesh = Mesh(devices, ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    start = time.perf_counter()
    with jax.set_mesh(mesh):
        program = jax.jit(function, in_shardings=sharding, out_shardings=sharding).lower(*arguments).compile()
    return program, time.perf_counter() - start


def count(program, pattern: str) -> int:
    return len(re.findall(pattern, program.as_text()))


def require(found: int, wanted: int, what: str) -> None:
    if found != wanted:
        raise SystemExit(f"{what}: {found}, wanted {wanted}")


def check_memory(machine: str, device) -> None:
    for case in CASES:
        for part, ours, theirs in zip(PARTS, kernels(case.levels), plain(case.levels), strict=True):
            arguments = case.arguments(1)[: 3 if part == "forward" else 4]
            program, seconds = compiled(ours, arguments, [device])
            other, _ = compiled(theirs, arguments, [device])
            require(count(program, KERNEL), KERNELS[machine, part], f"{machine}, {case.name}, {part}: kernels")
            mine, plain_form = (p.memory_analysis().temp_size_in_bytes / 2**20 for p in (program, other))
            if mine > plain_form:
                raise SystemExit(f"{machine}, {case.name}, {part}: {mine:.1f} MiB, XLA's form {plain_form:.1f}")
            row = (machine, case.name, jnp.dtype(case.dtype).name, part)
            print("|", " | ".join(row), f"| {mine:.1f} | {plain_form:.1f} | {seconds:.0f} |", flush=True)


def check_devices(machine: str, devices: Sequence) -> None:
    case = CASES[0]
    program, _ = compiled(kernels(case.levels)[1], case.arguments(len(devices)), devices)
    require(count(program, KERNEL), KERNELS[machine, PARTS[1]], f"{len(devices)} × {machine}: kernels")
    require(count(program, COLLECTIVE), 0, f"{len(devices)} × {machine}: collectives")
    print(f"{len(devices)} × {machine}, {case.name}, {PARTS[1]}: nothing is communicated", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    machines = {
        "H100": describe("h100:4")[1],
        "v5e": describe("v5e:2x2")[1],
    }
    print("| compiled for | use | dtype | part | temporary memory, MiB | XLA's form, MiB | compile, s |")
    print("|---|---|---|---|---|---|---|")
    for machine, devices in machines.items():
        check_memory(machine, devices[0])
    print()
    for machine, devices in machines.items():
        check_devices(machine, devices)


if __name__ == "__main__":
    main()
