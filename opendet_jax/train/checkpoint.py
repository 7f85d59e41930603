"""Checkpoints by Orbax: parameters, optimizer state, the data iterator's state and the config that made them."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from opendet_jax.config import Config
from opendet_jax.errors import InputError
from opendet_jax.train.state import TrainState
from opendet_jax.weights.folder import CHECKPOINTS, read, steps

# Fields that shape the parameters or the meaning of a name's tokens: a checkpoint fits only a config that agrees.
BINDING_SECTIONS = ("model", "ablation")
BINDING_DATA = ("tokenizer", "text_embeddings")
# Fields of the model that evaluation may choose anew: which queries are kept, what enters T5, how numbers are computed.
CHOSEN_IN_EVALUATION = frozenset(
    f"model.{name}"
    for name in (
        *("max_queries", "min_queries", "score_threshold", "query_fill"),
        *("normalise_prompts_at_inference", "dtype", "remat"),
    )
)


class CheckpointError(InputError):
    """A checkpoint that is missing, or that another config made."""


class Checkpoints:
    """The checkpoints of one workdir. Saving is asynchronous and atomic; `close` waits for it."""

    def __init__(self, workdir: Path, config: Config, keep: int | None = None):
        self.folder = workdir / CHECKPOINTS
        self.config = config
        self._manager = ocp.CheckpointManager(
            self.folder.absolute(),
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True),
            item_handlers={
                "params": ocp.StandardCheckpointHandler(),
                "opt_state": ocp.StandardCheckpointHandler(),
                "iterator": ocp.JsonCheckpointHandler(),
                "config": ocp.JsonCheckpointHandler(),
            },
        )

    @property
    def newest(self) -> int | None:
        return self._manager.latest_step()

    def save(self, state: TrainState, iterator_state: dict[str, Any]) -> None:
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(state.params),
                opt_state=ocp.args.StandardSave(state.opt_state),
                iterator=ocp.args.JsonSave(iterator_state),
                config=ocp.args.JsonSave(self.config.to_dict()),
            ),
        )

    def restore(self, template: TrainState, step: int) -> tuple[TrainState, dict[str, Any]]:
        """The state saved at `step`, with the template's shapes and shardings, and the data iterator's state.

        Raises:
            CheckpointError: another config made it (every field that differs is named).
        """
        saved = self._manager.restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore()))["config"]
        check_same(saved, self.config, self.folder / str(step))
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(_abstract(template.params)),
                opt_state=ocp.args.StandardRestore(_abstract(template.opt_state)),
                iterator=ocp.args.JsonRestore(),
            ),
        )
        counter = jax.device_put(jnp.asarray(step, jnp.int32), template.step.sharding)
        return TrainState(counter, restored["params"], restored["opt_state"]), restored["iterator"]

    def wait(self) -> None:
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()


def _abstract(tree: Any) -> Any:
    """Shapes, types and shardings in place of arrays."""
    return jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    fields = {}
    for key, value in config.items():
        if isinstance(value, dict):
            fields.update(_flat(value, f"{prefix}{key}."))
        else:
            fields[prefix + key] = value
    return fields


def check_same(saved: dict[str, Any], config: Config, where: Path, free: frozenset[str] = frozenset()) -> None:
    """Raises CheckpointError listing every binding field, but for those `free`, in which the configs differ."""

    def binding(values: dict[str, Any]) -> dict[str, Any]:
        parts = {name: values[name] for name in BINDING_SECTIONS}
        parts["data"] = {name: values["data"][name] for name in BINDING_DATA}
        return _flat(json.loads(json.dumps(parts)))  # tuples become lists, as in the saved json

    old, new = binding(saved), binding(config.to_dict())
    lines = [
        f"  {name}: checkpoint {old.get(name, '(absent)')!r}, config {new.get(name, '(absent)')!r}"
        for name in sorted(old.keys() | new.keys())
        if name not in free and old.get(name) != new.get(name)
    ]
    if lines:
        raise CheckpointError(f"{where} was made by another config:\n" + "\n".join(lines))


def find(workdir: Path, step: int = -1) -> int:
    """The newest step (−1), or `step` itself. Raises CheckpointError naming the folder and the steps that are there."""
    folder, found = workdir / CHECKPOINTS, steps(workdir)
    if not found:
        raise CheckpointError(f"no checkpoint in {folder}")
    if step < 0:
        return found[-1]
    if step not in found:
        raise CheckpointError(f"no checkpoint of step {step} in {folder}; there are {', '.join(map(str, found))}")
    return step


def restore(workdir: Path | str, step: int = -1) -> tuple[Config, dict[str, Any], int]:
    """(config, parameters, step) of a checkpoint, for inference: the newest, or the one of `step`.

    Raises:
        CheckpointError: there is no such checkpoint.
    """
    workdir = Path(workdir)
    step = find(workdir, step)
    saved, params = read(workdir, step)
    return Config.from_dict(saved), params, step
