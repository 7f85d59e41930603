"""Compiles the real training step, at its full size, for machines that are not here, and reports what it would take.

    python -m opendet_jax.scaling --config=configs/swin_t.py --topology=v5e:4x4 --mesh=data:16
    python -m opendet_jax.scaling --config=configs/swin_t.py --topology=h100:8 --mesh=data:4,fsdp:2

Fields of the config are set as for training: --config.model.dtype=bfloat16. docs/scaling.md explains the report.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from opendet_jax.config import Config, MeshConfig, config_hash
from opendet_jax.config_files import at_least, config_from_arguments, validate
from opendet_jax.errors import InputError
from opendet_jax.files import write_json
from opendet_jax.parallel.mesh import AXES, batch_shards, check_batch, make_mesh
from opendet_jax.scaling.machines import MACHINES, Machine, bound, describe
from opendet_jax.scaling.program import Program, TooLargeError, collectives, compile_step, largest_bucket, summary

MIB = 2**20
LEVELS = ("O0", "O1", "O2", "O3")
DEFAULT_LEVEL = "UNKNOWN"  # of jax_optimization_level: the compiler's own
_COUNTED = {
    "compiler": "as the compiler counts: none in kernels, one round of each loop",
    "trace": "of the traced program's products, as this compiler counts none",
}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m opendet_jax.scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--topology", required=True, help=f"MACHINE:SHAPE, of {', '.join(MACHINES)}")
    made.add_argument("--mesh", default="data:-1", help="axis:size,… of data, fsdp, tensor (default: %(default)s)")
    made.add_argument("--images", type=at_least(1), default=2, help="of each share of the batch (default: %(default)s)")
    made.add_argument(
        "--level",
        choices=LEVELS,
        default=DEFAULT_LEVEL,
        help="what the compiler spends on a fast program (default: its own)",
    )
    made.add_argument("--json", type=Path, help="file for the numbers")
    made.add_argument("--hlo", type=Path, help="file for the compiled program's text")
    return made


def mesh_config(text: str) -> MeshConfig:
    """ "data:4,fsdp:2" → MeshConfig; axes that are not named are 1. Raises InputError."""
    sizes = dict.fromkeys(AXES, 1)
    for part in text.split(","):
        axis, _, size = part.partition(":")
        if axis not in sizes or not size.lstrip("-").isdigit():
            raise InputError(f"--mesh={text}: must be axis:size,… of the axes {', '.join(AXES)}")
        sizes[axis] = int(size)
    return MeshConfig(**sizes)


def point(arguments: argparse.Namespace, config: Config) -> dict:
    """Compiles and measures. Raises InputError of many kinds."""
    jax.config.update("jax_optimization_level", arguments.level)
    machine, devices = describe(arguments.topology)
    mesh = make_mesh(mesh_config(arguments.mesh), devices)
    batch = arguments.images * batch_shards(mesh)
    config = replace(config, data=replace(config.data, batch_size=batch))
    validate(config)
    check_batch(config, mesh)
    try:
        program = compile_step(config, mesh, machine.compiler_options)
    except TooLargeError as error:
        return refused(config, arguments.topology, machine, mesh, error)
    if arguments.hlo:
        arguments.hlo.write_text(program.compiled.as_text())
    return measure(config, arguments.topology, machine, mesh, program)


def measure(config: Config, topology: str, machine: Machine, mesh: Any, program: Program) -> dict[str, Any]:
    """Everything that is reported, ready for json. Memory in bytes a device, times in seconds."""
    memory, counted = program.memory(), program.cost("flops")
    flops = program.products if counted is None else counted
    found = summary(collectives(program.compiled.as_text(), mesh.size))
    state = sum(memory[part] for part in ("parameters", "optimizer", "average"))
    sent = float(sum(kind["bytes_sent"] for kind in found.values()))
    return {
        **heading(config, topology, mesh),
        "compile_seconds": program.seconds,
        "memory": memory,
        "memory_limit": machine.memory,
        "fits": memory["peak"] <= machine.memory,
        "flops": flops,
        "flops_counted_by": "trace" if counted is None else "compiler",
        "bytes_accessed": program.cost("bytes accessed"),
        "collectives": found,
        "bound": bound(machine, flops, state, sent).report(config.data.batch_size),
    }


def refused(config: Config, topology: str, machine: Machine, mesh: Any, error: TooLargeError) -> dict[str, Any]:
    """The same of a program that its compiler refused; None where it did not say how much memory it needs."""
    return {
        **heading(config, topology, mesh),
        "memory": {"peak": error.needed},
        "memory_limit": machine.memory,
        "fits": False,
    }


def heading(config: Config, topology: str, mesh: Any) -> dict[str, Any]:
    """What was compiled."""
    return {
        "config": config.name,
        "config_hash": config_hash(config),
        "topology": topology,
        "devices": mesh.size,
        "mesh": {axis: mesh.shape[axis] for axis in AXES},
        "batch": config.data.batch_size,
        "images_per_share": config.data.batch_size // batch_shards(mesh),
        "accumulate": config.train.accumulate,
        "picture": list(largest_bucket(config)),
        "dtype": config.model.dtype,
        "remat": config.model.remat,
        "level": jax.config.values["jax_optimization_level"].replace(DEFAULT_LEVEL, "default"),
        "jax": jax.__version__,
    }


def lines(point: dict[str, Any]) -> str:
    """The numbers of `measure`, to read."""
    height, width = point["picture"]
    axes = " × ".join(f"{axis} {size}" for axis, size in point["mesh"].items())
    text = [
        f"{point['config']} compiled for {point['topology']} ({point['devices']} devices), mesh {axes}",
        f"batch {point['batch']}: {point['images_per_share']} pictures of {height}×{width} a share, {point['dtype']}"
        + (", recomputed layers" if point["remat"] else "")
        + (f", {point['accumulate']} parts" if point["accumulate"] > 1 else ""),
        f"never run: compiled ahead of time, level {point['level']}, every figure is of one device",
        "",
    ]
    memory = point["memory"]
    if "bound" not in point:  # the compiler refused it
        needed = "more" if memory["peak"] is None else f"{memory['peak'] / MIB:,.0f} MiB"
        text += [f"DOES NOT FIT: it needs {needed}, a device has {point['memory_limit'] / MIB:,.0f} MiB"]
        return "\n".join(text)
    text += [f"{name:<28}{memory[name] / MIB:>12,.1f} MiB" for name in ("parameters", "optimizer")]
    text += [f"{'moving average':<28}{memory['average'] / MIB:>12,.1f} MiB"] * bool(memory["average"])
    verdict = "fits in" if point["fits"] else "DOES NOT FIT in"
    text += [
        f"{'activations, temporaries':<28}{memory['activations'] / MIB:>12,.1f} MiB",
        f"{'program':<28}{memory['code'] / MIB:>12,.1f} MiB",
        f"{'peak':<28}{memory['peak'] / MIB:>12,.1f} MiB, {verdict} {point['memory_limit'] / MIB:,.0f}",
        f"{'operations':<28}{point['flops'] / 1e12:>12,.3f} TFLOP, {_COUNTED[point['flops_counted_by']]}",
        f"{'compile time':<28}{point['compile_seconds']:>12,.0f} s",
        "",
        f"{'collectives':<20}{'number':>8}{'in loops':>10}{'MiB':>12}{'MiB sent':>12}",
    ]
    text += [
        f"{kind:<20}{n['count']:>8}{n['in_loops']:>10}{n['bytes'] / MIB:>12,.1f}{n['bytes_sent'] / MIB:>12,.1f}"
        for kind, n in point["collectives"].items()
    ] or ["none"]
    low = point["bound"]
    text += [
        "",
        "Lower bound of the step's time (not a prediction), from published peak rates:",
        f"  computation   {1e3 * low['compute_seconds']:>10.2f} ms",
        f"  memory        {1e3 * low['memory_seconds']:>10.2f} ms, state read and written once",
        f"  communication {1e3 * low['communication_seconds']:>10.2f} ms, "
        f"{low['communication_share']:.0%} if nothing overlaps",
        f"  step          {1e3 * low['step_seconds']:>10.2f} ms at least ({low['limit']}), "
        f"{1e3 * low['image_seconds']:.3f} ms an image",
    ]
    return "\n".join(text)


def main() -> None:
    arguments, rest = parser().parse_known_args()
    jax.config.update("jax_platforms", "cpu")  # the compilers of others are asked for, never their devices
    try:
        found = point(arguments, config_from_arguments(rest))
        if arguments.json:
            write_json(arguments.json, found)
    except InputError as error:
        sys.exit(f"error: {error}")
    print(lines(found))


if __name__ == "__main__":
    main()
