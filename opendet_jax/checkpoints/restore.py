"""Which folder is meant and which checkpoint of it, and what inference needs of that: config and parameters."""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from absl import logging

from opendet_jax.checkpoints import hub, intact
from opendet_jax.checkpoints.folder import (
    CARD,
    CHECKPOINTS,
    CONFIG,
    MODEL,
    MODELS,
    TOKENIZER,
    TOKENIZER_FILES,
    is_portable,
    read,
    read_portable,
)
from opendet_jax.checkpoints.intact import DamagedError
from opendet_jax.checkpoints.same_config import CheckpointError, as_written
from opendet_jax.config import Config
from opendet_jax.config_files import parse_config
from opendet_jax.errors import WeightsError

INFERENCE = ("params", "average", "config")  # the items that a trained model consists of


def find_model(name: Path | str) -> Path:
    """The folder of that name; where there is none, or one of results alone, the model that comes with the package.

    Of hf://user/model the folder in the cache, after what is new has been fetched (`hub.fetch`, which raises
    WeightsError).
    """
    if hub.is_name(name):
        more = (CARD, *(f"{TOKENIZER}/{file}" for file in TOKENIZER_FILES))
        return hub.fetch(hub.parse(name), (CONFIG, MODEL, intact.MANIFEST), more)
    folder = Path(name)
    own = MODELS / folder.name
    comes_along = folder.name == str(folder) and (own / MODEL).is_file()
    is_theirs = (folder / CHECKPOINTS).exists() or is_portable(folder)  # also that of a run without a checkpoint yet
    return own if comes_along and not is_theirs else folder


def workdir_of(name: Path | str) -> Path:
    """Where results of a model are written: its folder; of hf://user/model runs/user/model, where it is started."""
    return hub.parse(name).results if hub.is_name(name) else Path(name)


def find(workdir: Path, step: int = -1, items: Collection[str] = INFERENCE) -> int:
    """The newest step whose `items` are undamaged (−1), or `step` itself.

    Raises:
        CheckpointError: there is none, or that of `step` is missing (those that are there are named) or damaged.
    """
    folder, found = workdir / CHECKPOINTS, intact.steps(workdir / CHECKPOINTS)
    for path in intact.unfinished(folder):
        logging.warning("%s: a save that goes on, or was cut off; ignored", path)
    if not found:
        raise CheckpointError(f"no checkpoint in {folder}")
    if step == -1:
        newest, problems = intact.newest_intact(folder, items)
        consequence = "" if newest is None else "; falling back to the checkpoint before it"
        for problem in problems:
            logging.warning("%s%s", problem, consequence)
        if newest is None:
            raise CheckpointError(f"{folder}: every checkpoint is damaged")
        return newest
    if step not in found:
        raise CheckpointError(f"no checkpoint of step {step} in {folder}; there are {', '.join(map(str, found))}")
    try:
        intact.verify(folder / str(step), items)
    except DamagedError as error:
        raise CheckpointError(str(error)) from error
    return step


def restore(workdir: Path | str, step: int = -1) -> tuple[Config, dict[str, Any], int]:
    """(config, parameters, step) of a checkpoint, for inference: the newest, or the one of `step`.

    Of a portable model too, and by its name of one on the Hugging Face hub (hf://user/model) or one that comes with
    the package (`checkpoints/folder.py`).

    Raises:
        CheckpointError: there is no such checkpoint, or it is damaged.
        WeightsError: the hub does not give it (`hub.fetch`).
    """
    workdir = find_model(workdir)
    if is_portable(workdir):
        try:
            saved, params, there = read_portable(workdir)
        except WeightsError as error:
            raise CheckpointError(str(error)) from error
        if step not in (-1, there):
            raise CheckpointError(f"no checkpoint of step {step} in {workdir}; its model is that of step {there}")
        return parse_config(as_written(saved)), params, there
    step = find(workdir, step)
    try:
        saved, params = read(workdir, step)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{workdir / CHECKPOINTS / str(step)}: cannot be read: {cause(error)}") from error
    return parse_config(as_written(saved)), params, step


def has_note(checkpoint: Path) -> bool:
    """Not so in checkpoints of earlier versions."""
    return (checkpoint / intact.NOTE).is_dir()


def cause(error: BaseException) -> str:
    """One line of what is at the bottom of Orbax's errors."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split()) or type(error).__name__
    system = re.search(r"\[OS error \d+: (?:E[A-Z]+ )?([^\]]+)\]", text) or re.search(
        r"([^:\[]+) \[os_error_code=", text
    )
    return system[1].strip() if system else text[:200]
