"""Takes steps of a small model on forced devices: `python -m tests.train.on_meshes OUT DATA,FSDP,TENSOR[,PARTS] …`.

PARTS: gradients of the batch are accumulated in so many.

OUT/<mesh>.npz gets the loss terms and gradients of the first step and the parameters after STEPS steps of SGD,
OUT/<mesh>.hlo the compiled program. Several processes: --process=NUMBER,COUNT,HOST:PORT; the first one writes.
"""

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax.traverse_util import flatten_dict

from opendet_jax.batch import Batch, Images, Objects
from opendet_jax.config import Config, MeshConfig
from opendet_jax.model.opendet import OpenDet, init_params
from opendet_jax.parallel.mesh import local_copy, make_mesh, own_rows, place_batch
from opendet_jax.parallel.processes import is_first, join_processes
from opendet_jax.parallel.sharding import partition
from opendet_jax.train.optimizer import fresh_state
from opendet_jax.train.step import jit_step, make_train_step
from tests.model.conftest import TINY

STEPS = 5
IMAGES = 8
CONFIG = replace(Config(), model=TINY, data=replace(Config().data, batch_size=IMAGES))


def batch() -> Batch:
    """Images with no, some and many objects; numbers that are powers of two would hide a wrong mean."""
    rng = np.random.default_rng(0)
    mask = np.ones((IMAGES, 64, 64), bool)
    mask[1, :, 48:], mask[6, 32:] = False, False
    valid = np.arange(5) < np.array([2, 4, 0, 1, 5, 3, 1, 3])[:, None]
    texts = rng.normal(size=(IMAGES, 5, 32)).astype(np.float32)
    texts[:, 1] = texts[:, 0]
    texts /= np.linalg.norm(texts, axis=-1, keepdims=True)
    boxes = np.concatenate([rng.uniform(0.3, 0.7, (IMAGES, 5, 2)), rng.uniform(0.1, 0.4, (IMAGES, 5, 2))], axis=-1)
    tokens = rng.integers(2, 24, (IMAGES, 5, 4)).astype(np.int32)
    tokens[..., 2], tokens[::2, :, 3] = 1, 0
    tokens = np.where(valid[..., None], tokens, 0)
    pixels = rng.integers(0, 256, (IMAGES, 64, 64, 3), dtype=np.uint8)
    return Batch(Images(pixels, mask), Objects(boxes.astype(np.float32), valid, texts, tokens))


def random_params(model: OpenDet) -> dict:
    """Random numbers everywhere, so that no branch is at zero; scales of norms around 1."""
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        width = 0.1 if leaf.ndim == 1 else leaf.shape[0] ** -0.5
        return rng.normal(path[-1].key == "scale", width, leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(partial(init_params, model), jax.random.key(0)))


def recording() -> optax.GradientTransformation:
    """Its state is the last gradient."""
    return optax.GradientTransformation(lambda params: params, lambda updates, state, params=None: (updates, updates))


def steps_on(sizes: MeshConfig, parts: int) -> tuple[dict[str, Any], str]:
    """(terms, gradients and parameters by name, the compiled program)."""
    config = replace(CONFIG, train=replace(CONFIG.train, accumulate=parts))
    # From process to process and back, as a mesh of TPUs does that goes along their links.
    devices = sorted(jax.devices(), key=lambda device: device.id % jax.local_device_count())
    mesh, model = make_mesh(sizes, devices[: sizes.data * sizes.fsdp * sizes.tensor]), OpenDet(TINY)
    optimizer = optax.chain(recording(), optax.sgd(1e-3))
    whole = fresh_state(random_params(model), optimizer, config)
    with jax.set_mesh(mesh):
        state = jax.device_put(whole, partition(whole, mesh))
        rows = own_rows(mesh, IMAGES)
        images = place_batch(jax.tree.map(lambda x: x[rows], batch()), mesh)
        program = jit_step(make_train_step(model, optimizer, config), state, mesh).lower(state, images).compile()
        state, terms = program(state, images)
        found = {f"term:{name}": np.asarray(value) for name, value in terms.items()}
        found |= _named("gradient", local_copy(state.opt_state[0], mesh))
        for _ in range(STEPS - 1):
            state, _ = program(state, images)
        assert int(state.step) == STEPS
        return found | _named("parameter", local_copy(state.params, mesh)), program.as_text()


def _named(kind: str, params: Any) -> dict[str, Any]:
    return {f"{kind}:{path}": np.asarray(leaf) for path, leaf in flatten_dict(params, sep="/").items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("meshes", nargs="+")
    parser.add_argument("--process")
    arguments = parser.parse_args()
    if arguments.process:
        number, count, coordinator = arguments.process.split(",")
        join_processes(MeshConfig(processes=int(count), process=int(number), coordinator=coordinator))
    for name in arguments.meshes:
        data, fsdp, tensor, parts = [int(size) for size in f"{name},1".split(",")][:4]
        found, program = steps_on(MeshConfig(data, fsdp, tensor), parts)
        if is_first():
            np.savez(arguments.out / f"{name}.npz", allow_pickle=False, **found)
            (arguments.out / f"{name}.hlo").write_text(program)


if __name__ == "__main__":
    main()
