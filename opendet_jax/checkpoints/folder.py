"""A folder of converted weights: parameters by Orbax, sizes, and a note of where they come from.

It is laid out like a training run's workdir with one checkpoint of step 0, so that a whole model's folder can be given
to `opendet_jax.load`.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging

from opendet_jax.checkpoints import intact
from opendet_jax.errors import WeightsError
from opendet_jax.files import try_folder, write_json

CHECKPOINTS, NOTE, TOKENIZER = "checkpoints", "weights.json", "tokenizer"
KINDS = ("opendet", "swin", "t5", "clip")
STEP = 0


@dataclass(frozen=True)
class Converted:
    kind: str  # opendet, swin, t5 or clip
    config: Mapping[str, Any]  # sizes; of a whole model, its Config
    params: Mapping[str, Any]


def _manager(folder: Path, create: bool) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(
        (folder / CHECKPOINTS).absolute(),
        options=ocp.CheckpointManagerOptions(create=create),
        item_handlers={
            "params": ocp.StandardCheckpointHandler(),
            "average": ocp.StandardCheckpointHandler(),
            "config": ocp.JsonCheckpointHandler(),
            # What a run saves beside them (train/checkpoint.py) and nobody reads here; without a handler Orbax warns.
            "opt_state": ocp.StandardCheckpointHandler(),
            "iterator": ocp.JsonCheckpointHandler(),
            intact.NOTE: ocp.JsonCheckpointHandler(),
        },
    )


def check_free(folder: Path) -> None:
    """Raises WeightsError where the folder already holds weights, or where nothing could be written into it."""
    try:
        if any((folder / name).exists() for name in (CHECKPOINTS, NOTE, TOKENIZER)):
            raise WeightsError(f"{folder}: already holds weights; give another folder")
        try_folder(folder)
    except OSError as error:
        raise WeightsError(f"{folder}: no weights can be written there: {error.strerror}") from error


def save(folder: Path, converted: Converted, note: Mapping[str, Any], tokenizer: Path | None = None) -> None:
    """Writes the checkpoint and the note of where it comes from, both or neither. `note`: source, files, licence, …

    `tokenizer`: a folder to copy beside them.
    """
    check_free(folder)
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=".part.", dir=folder) as name:
            _write(Path(name), converted, note, tokenizer)
            # A folder without a checkpoint holds no weights yet, so that it comes last.
            for part in (NOTE, TOKENIZER, CHECKPOINTS):
                if (Path(name) / part).exists():
                    os.replace(Path(name) / part, folder / part)
    finally:
        if not (folder / CHECKPOINTS).exists():
            (folder / NOTE).unlink(missing_ok=True)
            shutil.rmtree(folder / TOKENIZER, ignore_errors=True)
        if is_new and not any(folder.iterdir()):
            folder.rmdir()


def _write(folder: Path, converted: Converted, note: Mapping[str, Any], tokenizer: Path | None) -> None:
    with _manager(folder, create=True) as manager:
        manager.save(
            STEP,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(converted.params), config=ocp.args.JsonSave(dict(converted.config))
            ),
        )
    intact.write_manifest(folder / CHECKPOINTS / str(STEP))
    if tokenizer is not None:
        shutil.copytree(tokenizer, folder / TOKENIZER)
    write_json(folder / NOTE, {"kind": converted.kind, **note})


def read(folder: Path, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """(config, parameters) of a checkpoint, on the first device: their moving average, where training kept one."""
    item = _item(folder, step)
    with _manager(folder, create=False) as manager:
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        metadata = manager.item_metadata(step)[item]
        template = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), metadata)
        restored = manager.restore(
            step,
            args=ocp.args.Composite(**{item: ocp.args.StandardRestore(template)}, config=ocp.args.JsonRestore()),
        )
    return restored["config"], restored[item]


def _item(folder: Path, step: int) -> str:
    return "average" if (folder / CHECKPOINTS / str(step) / "average").is_dir() else "params"


def read_config(folder: Path, kind: str) -> dict[str, Any]:
    """The config alone of what `load` reads. Raises WeightsError where there is nothing of that kind."""
    _require_kind(folder, kind)
    with _manager(folder, create=False) as manager:
        restored = manager.restore(_newest(folder, "config"), args=ocp.args.Composite(config=ocp.args.JsonRestore()))
    return restored["config"]


def read_shapes(folder: Path, kind: str) -> Converted:
    """What `load` gives, with shapes in the place of arrays. Raises WeightsError as it does."""
    _require_kind(folder, kind)
    step = _newest(folder, "params", "average", "config")
    with _manager(folder, create=False) as manager:
        restored = manager.restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore()))
        metadata = manager.item_metadata(step)[_item(folder, step)].tree
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), metadata)
    return Converted(kind, restored["config"], shapes)


def load(folder: Path, kind: str) -> Converted:
    """What `save` wrote, or the newest checkpoint of a training run, which is a whole model.

    Raises WeightsError where there is nothing of that kind.
    """
    _require_kind(folder, kind)
    return Converted(kind, *read(folder, _newest(folder, "params", "average", "config")))


def _newest(folder: Path, *items: str) -> int:
    """The newest step whose items are undamaged. Damaged ones are reported; raises WeightsError where all are."""
    step, problems = intact.newest_intact(folder / CHECKPOINTS, items)
    for problem in problems:
        logging.warning("%s", problem)
    if step is None:
        raise WeightsError(f"{folder}: what it holds is damaged")
    return step


def _require_kind(folder: Path, kind: str) -> None:
    note = read_note(folder)
    if note["kind"] != kind:
        raise WeightsError(f"{folder}: holds weights of kind {note['kind']!r}, not {kind!r}")


def read_note(folder: Path) -> dict[str, Any]:
    """The note of a folder of converted weights; a training run is a model of kind "opendet".

    Raises WeightsError where there are no weights, or the note is damaged.
    """
    if not intact.steps(folder / CHECKPOINTS):
        nothing = "holds no converted weights" + ("" if folder.is_dir() else " (there is no such folder)")
        raise WeightsError(f"{folder}: {nothing}; python -m opendet_jax.weights convert makes them")
    path = folder / NOTE
    if not path.exists():
        return {"kind": "opendet"}
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: is damaged: {error}") from error
    if not isinstance(note, dict) or note.get("kind") not in KINDS:
        kind = note.get("kind") if isinstance(note, dict) else None
        raise WeightsError(f"{path}: is damaged: its kind is {kind!r:.40}, none of {', '.join(KINDS)}")
    return note
