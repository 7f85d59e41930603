"""--mode=replay: a step that was not finite, once more, and where in the model it began."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from opendet_jax.batch import Batch
from opendet_jax.config import Config
from opendet_jax.model.opendet import OpenDet
from opendet_jax.train.checkpoint import Checkpoints
from opendet_jax.train.mesh import check_batch, make_mesh, own_rows, place_batch
from opendet_jax.train.optimizer import make_optimizer
from opendet_jax.train.replay_file import ReplayError, load_batch
from opendet_jax.train.state import abstract_state
from opendet_jax.train.step import step_gradients

# From the losses back to the image: a gradient that is not finite spreads in this order.
BACKWARDS = (
    *("name_generator", "distiller", "aligner_one_to_one", "aligner_one_to_many", "aligner_encoder"),
    *("decoder", "denoising", "query_selection", "encoder", "neck", "backbone"),
)
SHOWN = 10  # parameters of the first module


def replay(config: Config, workdir: Path) -> None:
    """Takes the step of `train.replay` from the checkpoint it started from, with the same randomness, and reports.

    Printed: every loss term, and every module from the losses back to the image with how many numbers of its gradient
    are not finite; the first such module with its parameters. Nothing is written.

    Raises:
        ReplayError: no file is named, it or it holds no batch.
        CheckpointError: the checkpoint is missing, damaged, or of another config.
    """
    if not config.train.replay:
        raise ReplayError("config.train.replay is empty: name a file of <workdir>/non_finite/")
    replayed = load_batch(Path(config.train.replay))
    model, optimizer = OpenDet(config.model, config.ablation), make_optimizer(config.optimizer, config.ablation)
    mesh = make_mesh(config.mesh)
    check_batch(config, mesh)
    template = abstract_state(model, optimizer, config, mesh)
    checkpoints = Checkpoints(workdir, config, read_only=True)
    state, _ = checkpoints.restore(template, replayed.step)
    checkpoints.close()
    with jax.set_mesh(mesh):
        rows = own_rows(mesh, len(replayed.image_ids))
        batch = place_batch(jax.tree.map(lambda x: x[rows], replayed.batch), mesh)
        terms, grads = jax.jit(step_gradients(model, config))(state.params, batch, state.step)
        updates, _ = jax.jit(optimizer.update)(grads, state.opt_state, state.params)
    print(
        f"step {replayed.step + 1}, from the checkpoint of step {replayed.step}; images {replayed.image_ids.tolist()}"
    )
    print(report(replayed.batch, *jax.device_get((state.params, terms, grads, updates))))


def report(batch: Batch, params: dict[str, Any], terms: dict[str, Any], grads: dict[str, Any], updates: Any) -> str:
    """What is finite and what is not, in lines."""
    lines = [
        f"{title}: {_verdict(tree)}" for title, tree in (("batch", batch), ("parameters", params), ("update", updates))
    ]
    lines.append("loss terms:")
    lines += [f"  {name:<28} {float(value):<14.7g}{_mark(value)}" for name, value in terms.items()]
    lines.append("gradients, from the losses back to the image:")
    first = None
    for module in sorted(grads, key=BACKWARDS.index):
        lines.append(f"  {module:<28} {_verdict(grads[module])}")
        if first is None and _bad(grads[module]):
            first = module
    if first is None:
        lines.append("every gradient is finite")
        return "\n".join(lines)
    bad = [(path, leaf) for path, leaf in flatten_dict(grads[first], sep="/").items() if _bad(leaf)]
    lines.append(f"first: {first}, in {len(bad)} of its parameters:")
    lines += [f"  {first}/{path}: {_verdict(leaf)}" for path, leaf in bad[:SHOWN]]
    return "\n".join(lines + (["  …"] if len(bad) > SHOWN else []))


def _bad(tree: Any) -> int:
    """How many numbers of a tree are not finite."""
    return sum(int(np.sum(~np.isfinite(leaf))) for leaf in jax.tree.leaves(tree))


def _verdict(tree: Any) -> str:
    bad = _bad(tree)
    return f"{bad} of {sum(np.size(leaf) for leaf in jax.tree.leaves(tree))} numbers not finite" if bad else "finite"


def _mark(value: Any) -> str:
    return "" if np.isfinite(value) else "  ← not finite"
