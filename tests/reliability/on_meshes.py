"""Saves a state from one mesh and restores it onto others; prints the shapes of the parts that each device got.

python -m tests.reliability.on_meshes save|restore DIR DATA FSDP TENSOR [PROCESSES PROCESS HOST:PORT]
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from opendet_jax.config import Config, MeshConfig
from opendet_jax.model.opendet import OpenDet
from opendet_jax.parallel.mesh import make_mesh
from opendet_jax.parallel.processes import join_processes
from opendet_jax.train.checkpoint import Checkpoints
from opendet_jax.train.optimizer import TrainState, abstract_state, make_optimizer
from tests.reliability import toy
from tests.reliability.programs import tiny

ITERATOR = {"next_index": 3, "seed": "of the data"}
KERNEL = ("name_generator", "t5", "lm_head", "kernel")


def expected(shapes: TrainState) -> Any:
    """Numbers that say which leaf they are of, and where in it."""
    leaves, tree = jax.tree.flatten(shapes)
    return tree.unflatten(
        (i + np.arange(leaf.size).reshape(leaf.shape) / 1024).astype(leaf.dtype) for i, leaf in enumerate(leaves)
    )


def main(mode: str, folder: str, *numbers: str) -> None:
    toy.install(setattr)
    sizes, group = [int(number) for number in numbers[:3]], numbers[3:]
    mesh_config = MeshConfig(*sizes)
    if group:
        mesh_config = replace(mesh_config, processes=int(group[0]), process=int(group[1]), coordinator=group[2])
    join_processes(mesh_config)
    config: Config = replace(tiny(ema=0.9), mesh=mesh_config)
    model, optimizer = OpenDet(config.model, config.ablation), make_optimizer(config.optimizer, config.ablation)
    shapes = abstract_state(model, optimizer, config, make_mesh(config.mesh))
    wanted = replace(expected(shapes), step=np.int32(3), refused=np.int32(0))
    checkpoints = Checkpoints(Path(folder), config)
    if mode == "save":
        place = jax.tree.map(lambda leaf: leaf.sharding, shapes)
        state = jax.jit(lambda: jax.tree.map(jax.numpy.asarray, wanted), out_shardings=place)()
        checkpoints.save(state, ITERATOR)
    else:
        restored = checkpoints.restore_newest(shapes)
        assert restored is not None
        state, iterator_state = restored
        assert iterator_state == ITERATOR
        assert jax.tree.structure(state) == jax.tree.structure(wanted)
        for leaf, shape, whole in zip(*map(jax.tree.leaves, (state, shapes, wanted)), strict=True):
            assert leaf.sharding.is_equivalent_to(shape.sharding, leaf.ndim), (leaf.sharding, shape.sharding)
            for part in leaf.addressable_shards:
                np.testing.assert_array_equal(part.data, whole[part.index])
    checkpoints.close()
    kernel = state.params
    for name in KERNEL:
        kernel = kernel[name]
    print(mode, [part.data.shape for part in kernel.addressable_shards])


if __name__ == "__main__":
    main(*sys.argv[1:])
