"""Compiles the real training step, at its full size, for machines that are not here, and reports what it would take.

    python -m opendet_jax.scaling --config=configs/swin_t.py --topology=v5e:4x4 --mesh=data:16
    python -m opendet_jax.scaling --config=configs/swin_t.py --topology=h100:8 --mesh=data:4,fsdp:2

Fields of the config are set as for training: --config.model.dtype=bfloat16. docs/scaling.md explains the report.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import jax

from opendet_jax.config import Config, MeshConfig
from opendet_jax.config_files import at_least, config_from_arguments, validate
from opendet_jax.errors import InputError
from opendet_jax.files import write_json
from opendet_jax.parallel.mesh import AXES, batch_shards, check_batch, make_mesh
from opendet_jax.scaling.machines import MACHINES, describe
from opendet_jax.scaling.point import DEFAULT_LEVEL, lines, measure, refused
from opendet_jax.scaling.program import TooLargeError, compile_step

LEVELS = ("O0", "O1", "O2", "O3")


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
