"""--mode=replay: a step that was not finite, once more, and where in the model it began.

Its batch is in a file, <workdir>/non_finite/step_<n>.npz. Nothing in it can run.
"""

import re
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax.experimental import multihost_utils
from jaxtyping import Int64
from numpy import ndarray

from opendet_jax.batch import Batch, Images, Objects
from opendet_jax.compilation import compiler_options
from opendet_jax.config import Config
from opendet_jax.errors import InputError
from opendet_jax.files import replacing
from opendet_jax.model.opendet import OpenDet
from opendet_jax.parallel.mesh import check_batch, make_mesh, own_rows, place_batch
from opendet_jax.train.checkpoint import Checkpoints
from opendet_jax.train.finite import Sent
from opendet_jax.train.optimizer import abstract_state, make_optimizer
from opendet_jax.train.step import step_gradients

FOLDER = "non_finite"
# From the losses back to the image: a gradient that is not finite spreads in this order.
BACKWARDS = (
    *("name_generator", "distiller", "aligner_one_to_one", "aligner_one_to_many", "aligner_encoder"),
    *("decoder", "denoising", "query_selection", "encoder", "neck", "backbone"),
)
SHOWN = 10  # parameters of the first module


class ReplayError(InputError):
    """A file that holds no batch, or not all of it."""


@dataclass(frozen=True)
class Replayed:
    step: int  # steps taken before it: that of the checkpoint it started from
    batch: Batch  # of numpy arrays, of all processes
    image_ids: Int64[ndarray, "B"]


def save_batch(workdir: Path, sent: Sent) -> tuple[Path, Int64[ndarray, "B"]]:
    """Writes the batch, put together from all processes (each calls this). Its file, and the ids of its images.

    Where the workdir cannot be written the file is in a new folder of the system's place for temporary files. Raises
    OSError where that cannot be written either.
    """
    path = workdir / FOLDER / f"step_{sent.step + 1}.npz"
    images, objects = sent.batch.batch.images, sent.batch.batch.objects
    arrays: dict[str, Any] = {f"images.{name}": value for name, value in vars(images).items()}
    arrays |= {f"objects.{name}": value for name, value in vars(objects).items()}
    arrays |= {"image_ids": sent.batch.image_ids, "rows": sent.batch.rows}
    if jax.process_count() > 1:
        arrays["image_ids"] = arrays["image_ids"].view(np.int32).reshape(-1, 2)  # JAX would cut off the upper half
        arrays = dict(multihost_utils.process_allgather(arrays, tiled=True))
        arrays["image_ids"] = np.ascontiguousarray(arrays["image_ids"]).view(np.int64).reshape(-1)
    order = np.argsort(arrays.pop("rows"))
    arrays = {name: np.asarray(array)[order] for name, array in arrays.items()}
    if jax.process_index() == 0:
        arrays["step"] = np.int64(sent.step)
        try:
            _write(path, arrays)
        except OSError:
            path = Path(tempfile.mkdtemp(prefix="opendet_jax_")) / path.name
            _write(path, arrays)
    return path, arrays["image_ids"]


def _write(path: Path, arrays: dict[str, Any]) -> None:
    with replacing(path) as part, part.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def load_batch(path: Path) -> Replayed:
    """What `save_batch` wrote. Raises ReplayError."""
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        images = Images(arrays["images.pixels"], arrays["images.mask"])
        objects = Objects(*(arrays[f"objects.{name}"] for name in ("boxes", "valid", "texts", "tokens")))
        return Replayed(int(arrays["step"]), Batch(images, objects), arrays["image_ids"])
    except FileNotFoundError as error:
        raise ReplayError(f"{path}: no such file; training writes it where a step is not finite") from error
    except KeyError as error:
        raise ReplayError(f"{path}: has no array {error}: it is not the file of a batch") from error
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise ReplayError(f"{path}: cannot be read, or is not the file of a batch: {error}") from error


def replayed_steps(workdir: Path) -> set[int]:
    """The steps whose checkpoints the files in a workdir start from."""
    matches = (re.fullmatch(r"step_(\d+)\.npz", path.name) for path in (workdir / FOLDER).glob("*"))
    return {int(match[1]) - 1 for match in matches if match}


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
        options = compiler_options(mesh.devices.flat[0].platform, trains=True, params=state.params)
        terms, grads = jax.jit(step_gradients(model, config), compiler_options=options)(state.params, batch, state.step)
        updates, _ = jax.jit(optimizer.update, compiler_options=options)(grads, state.opt_state, state.params)
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
