"""Checkpoints by Orbax: everything a run needs to go on as if it had never stopped.

An item each: parameters, optimizer state, the data iterator's state, the config, and a note of the run: step, key of
the random numbers, hash of the config. checkpoints/intact.py says what makes a checkpoint complete and undamaged.
"""

import shutil
import tempfile
from collections.abc import Callable, Collection
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from absl import logging
from jax.experimental import multihost_utils

from opendet_jax.checkpoints import intact
from opendet_jax.checkpoints.folder import CHECKPOINTS, open_manager
from opendet_jax.checkpoints.restore import cause, find, has_note
from opendet_jax.checkpoints.same_config import CheckpointError, check_same
from opendet_jax.config import Config, config_hash
from opendet_jax.train.optimizer import TrainState

IteratorState = dict[str, Any]
ANSWERS = 64  # that `ask_once` remembers: a save asks about a folder for each of its items


class SaveError(CheckpointError):
    """A checkpoint that could not be written."""


class _Preserve(ocp.checkpoint_managers.PreservationPolicy):
    """Orbax's question which checkpoints stay, asked after each new one is complete."""

    def __init__(self, kept: Callable[[list[int]], Collection[int]]):
        self._kept = kept

    def should_preserve(self, checkpoints, *, context):
        kept = self._kept([checkpoint.step for checkpoint in checkpoints])
        return [checkpoint.step in kept for checkpoint in checkpoints]


class Checkpoints:
    """The checkpoints of one workdir. Saving is asynchronous and atomic; `wait` and `close` wait for it.

    In a run of several processes each method is called by all.
    """

    def __init__(
        self,
        workdir: Path,
        config: Config,
        kept: Callable[[list[int]], Collection[int]] = list,
        read_only: bool = False,
    ):
        """Reports saves that were cut off and, unless `read_only`, removes what they left.

        `kept`: which of the steps stay when a new one is complete; by default all.
        Raises CheckpointError where the folder cannot be used.
        """
        ask_once()
        self.folder = (workdir / CHECKPOINTS).absolute()
        self.config = config
        self._saving = -1
        try:
            if jax.process_index() == 0 and not read_only:
                self._prepare()
            self._manager = open_manager(
                self.folder,
                create=not read_only,
                preservation_policy=_Preserve(kept),
                async_options=ocp.AsyncOptions(post_finalization_callback=self._add_manifest),
            )
        except OSError as error:
            raise CheckpointError(f"{self.folder}: cannot be used: {error.strerror or error}") from error

    def _prepare(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=self.folder):
            pass  # better now than after the first hours
        for path in intact.unfinished(self.folder):
            logging.warning("%s: a save that was cut off; ignored and removed", path)
            shutil.rmtree(path)

    def _add_manifest(self) -> None:
        """Called in Orbax's own thread when every file is written, just before the checkpoint gets its name."""
        intact.write_manifest(intact.unfinished_folder(self.folder, self._saving))

    def steps(self) -> list[int]:
        """Of the checkpoints that are there, rising."""
        return list(self._manager.all_steps())

    def save(self, state: TrainState, iterator_state: IteratorState) -> None:
        """Begins to save; returns when the state may change again. A step that is saved already stays as it is.

        Raises SaveError, also for the save before this one.
        """
        self.wait()
        step = int(state.step)
        if step in self.steps():
            if (self.folder / str(step)).is_dir():
                return
            self._manager.reload()  # it was there, and something removed it
        self._saving = step
        note = {
            "step": step,
            "refused": int(state.refused) if self.config.train.non_finite == "skip" else 0,  # "stop": taken back
            "config_hash": config_hash(self.config),
            "prng": _prng(self.config),
        }
        averages = {} if state.average is None else {"average": ocp.args.StandardSave(state.average)}
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            opt_state=ocp.args.StandardSave(state.opt_state),
            **averages,
            iterator=ocp.args.JsonSave(iterator_state),
            config=ocp.args.JsonSave(self.config.to_dict()),
            **{intact.NOTE: ocp.args.JsonSave(note)},
        )
        try:
            self._manager.save(step, args=items)
        except Exception as error:  # which one depends on the file system and on where Orbax meets it
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> SaveError:
        complete = [step for step in intact.steps(self.folder) if step != self._saving]
        newest = f"the newest complete one is of step {complete[-1]}" if complete else "there is no complete one"
        return SaveError(f"{self.folder}: cannot save the checkpoint of step {self._saving}: {cause(error)}; {newest}")

    def check(self) -> None:
        """Raises SaveError where a save has failed in the meantime; does not wait for one that goes on."""
        if not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Waits until what was saved is complete. Raises SaveError."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._failed(error) from error

    def close(self) -> None:
        self.wait()
        self._manager.close()

    def restore_newest(self, template: TrainState) -> tuple[TrainState, IteratorState] | None:
        """What `restore` gives for the newest undamaged checkpoint; None where there is no checkpoint at all.

        Damaged ones are reported and set aside under another name.
        Raises CheckpointError where all are damaged, and as `restore` does.
        """
        step, damaged = _from_first_process(*(self._set_damaged_aside() if jax.process_index() == 0 else (-1, 0)))
        self._manager.reload()
        if step >= 0:
            return self._restore(template, step)
        if damaged:
            raise CheckpointError(f"{self.folder}: every checkpoint is damaged; another workdir starts anew")
        return None

    def _set_damaged_aside(self) -> tuple[int, int]:
        """(the newest undamaged step or −1, the number of damaged ones that are newer).

        Where no undamaged one is left, all stay: started again, the run must not take the folder for an empty one.
        """
        newest, problems = intact.newest_intact(self.folder)
        if newest is None:
            for problem in problems:
                logging.warning("%s", problem)
            return -1, len(problems)
        for problem, step in zip(problems, reversed(intact.steps(self.folder)), strict=False):
            place = intact.set_aside(self.folder / str(step))
            logging.warning("%s; falling back to the checkpoint before it; the damaged one is now %s", problem, place)
        return newest, len(problems)

    def restore(self, template: TrainState, step: int) -> tuple[TrainState, IteratorState]:
        """The state saved at `step`, with the template's shapes and shardings, and the data iterator's state.

        Raises:
            CheckpointError: it is missing, damaged, holds only weights, or another config made it (every field that
                differs is named).
        """
        return self._restore(template, find(self.folder.parent, step, items=()))

    def _restore(self, template: TrainState, step: int) -> tuple[TrainState, IteratorState]:
        where = self.folder / str(step)
        if not (where / "opt_state").is_dir():
            raise CheckpointError(
                f"{where}: holds weights, not a run that can go on; begin one in another workdir, "
                f"with --config.init.model={self.folder.parent}"
            )
        saved = self._items(where, config=ocp.args.JsonRestore())["config"]
        check_same(saved, self.config, where)
        note = self._items(where, **{intact.NOTE: ocp.args.JsonRestore()})[intact.NOTE] if has_note(where) else {}
        if note and note["prng"] != _prng(self.config):
            raise CheckpointError(f"{where}: its random numbers are {note['prng']}, not {_prng(self.config)}")
        trees = {"params": template.params, "opt_state": template.opt_state, "average": template.average}
        items = self._items(
            where,
            **{name: ocp.args.StandardRestore(_abstract(tree)) for name, tree in trees.items() if tree is not None},
            iterator=ocp.args.JsonRestore(),
        )
        refused = note.get("refused", 0) if self.config.train.non_finite == "skip" else 0
        state = replace(
            template,
            step=jax.device_put(np.int32(step), template.step.sharding),
            params=items["params"],
            opt_state=items["opt_state"],
            average=None if template.average is None else items["average"],
            refused=jax.device_put(np.int32(refused), template.refused.sharding),
        )
        return state, items["iterator"]

    def _items(self, where: Path, **items: ocp.args.CheckpointArgs) -> Any:
        try:
            return self._manager.restore(int(where.name), args=ocp.args.Composite(**items))
        except (OSError, ValueError, KeyError, TypeError) as error:  # what Orbax makes of files it cannot use
            raise CheckpointError(f"{where}: cannot be read: {cause(error)}") from error


def _prng(config: Config) -> dict[str, Any]:
    """The key that all randomness of a run comes from, and its generator."""
    key = jax.random.key(config.train.seed)
    return {"generator": str(jax.random.key_impl(key)), "key": np.asarray(jax.random.key_data(key)).tolist()}


def _from_first_process(*numbers: int) -> list[int]:
    """The first process's numbers, in every process."""
    if jax.process_count() == 1:
        return list(numbers)
    return np.asarray(multihost_utils.broadcast_one_to_all(np.array(numbers, np.int32))).tolist()


def _abstract(tree: Any) -> Any:
    """Shapes, types and shardings in place of arrays."""
    return jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)


_to_json = ts.KvStore.Spec.to_json
_answers: dict[tuple[str, bool], Any] = {}


def ask_once() -> None:
    """From now on in this process TensorStore answers each question about a folder once; the answers are the same.

    `KvStore.Spec.to_json` keeps the strings that it makes (seen in 0.1.78 to 0.1.86): 0.25 KiB a call, and the pages
    around them, never given back. Orbax calls it for the folder of every array that it saves or restores: a checkpoint
    of 983 arrays costs a run 0.8 MiB for good. Nothing of this is needed when TensorStore frees them.
    """
    ts.KvStore.Spec.to_json = _remembered


def _remembered(self: ts.KvStore.Spec, include_defaults: bool = False) -> Any:
    question = (repr(self), include_defaults)  # the text has all that a spec consists of
    answer = _answers.get(question)
    if answer is None:
        answer = _to_json(self, include_defaults=include_defaults)
        if len(_answers) >= ANSWERS:
            _answers.clear()
        _answers[question] = answer
    return deepcopy(answer)
