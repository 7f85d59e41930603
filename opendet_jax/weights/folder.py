"""A folder of converted weights: parameters by Orbax, sizes, and a note of where they come from.

It is laid out like a training run's workdir with one checkpoint of step 0, so that a whole model's folder can be given
to `opendet_jax.load`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from opendet_jax.files import write_json
from opendet_jax.weights.rules import WeightsError

CHECKPOINTS, NOTE = "checkpoints", "weights.json"
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
        item_handlers={"params": ocp.StandardCheckpointHandler(), "config": ocp.JsonCheckpointHandler()},
    )


def check_free(folder: Path) -> None:
    """Raises WeightsError where the folder already holds checkpoints."""
    if (folder / CHECKPOINTS).exists() or (folder / NOTE).exists():
        raise WeightsError(f"{folder}: already holds weights; give another folder")


def save(folder: Path, converted: Converted, note: Mapping[str, Any]) -> None:
    """Writes the checkpoint, then the note that says it is complete. `note`: source, files, licence, …"""
    check_free(folder)
    with _manager(folder, create=True) as manager:
        manager.save(
            STEP,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(converted.params), config=ocp.args.JsonSave(dict(converted.config))
            ),
        )
    write_json(folder / NOTE, {"kind": converted.kind, **note})


def steps(folder: Path) -> list[int]:
    """The steps of the complete checkpoints in a folder, rising."""
    checkpoints = folder / CHECKPOINTS
    return sorted(int(p.name) for p in checkpoints.glob("*") if p.name.isdigit()) if checkpoints.is_dir() else []


def read(folder: Path, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """(config, parameters) of a checkpoint, on the first device."""
    with _manager(folder, create=False) as manager:
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        metadata = manager.item_metadata(step)["params"]
        template = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), metadata)
        restored = manager.restore(
            step,
            args=ocp.args.Composite(params=ocp.args.StandardRestore(template), config=ocp.args.JsonRestore()),
        )
    return restored["config"], restored["params"]


def load(folder: Path, kind: str) -> Converted:
    """What `save` wrote, or the newest checkpoint of a training run, which is a whole model.

    Raises WeightsError where there is nothing of that kind.
    """
    note = read_note(folder)
    if note["kind"] != kind:
        raise WeightsError(f"{folder}: holds weights of kind {note['kind']!r}, not {kind!r}")
    return Converted(kind, *read(folder, steps(folder)[-1]))


def read_note(folder: Path) -> dict[str, Any]:
    """The note of a folder of converted weights; a training run is a model of kind "opendet".

    Raises WeightsError where there are no weights.
    """
    if not steps(folder):
        raise WeightsError(f"{folder}: holds no converted weights; python -m opendet_jax.weights convert makes them")
    path = folder / NOTE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"kind": "opendet"}
