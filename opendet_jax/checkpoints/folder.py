"""Folders that hold a model or a part of one.

A folder of converted weights has parameters by Orbax, sizes, and a note of where they come from. It is laid out like a
training run's workdir with one checkpoint of step 0, so that a whole model's folder can be given to `opendet_jax.load`.
A portable folder has a whole model in the two files that others expect, config.json and model.safetensors, with the
language model's tokenizer beside them, and so it lies on the Hugging Face hub (`hub.py`).
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from absl import logging
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from opendet_jax.checkpoints import intact
from opendet_jax.errors import WeightsError
from opendet_jax.files import replacing, try_folder, write_json

if TYPE_CHECKING:
    import orbax.checkpoint as ocp  # takes half a second: what is portable does without it

CHECKPOINTS, NOTE, TOKENIZER = "checkpoints", "weights.json", "tokenizer"
CONFIG, MODEL, CARD = "config.json", "model.safetensors", "README.md"
MODELS = Path(__file__).parents[1] / "models"  # those that come with the package
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("spiece.model", "vocab.json", "merges.txt"),
)
KINDS = ("opendet", "swin", "t5", "clip")
STEP = 0
ARRAYS = ("params", "opt_state", "average")  # the items of a checkpoint (train/checkpoint.py): trees of arrays,
NOTES = ("iterator", "config", intact.NOTE)  # and json


@dataclass(frozen=True)
class Converted:
    kind: str  # opendet, swin, t5 or clip
    config: Mapping[str, Any]  # sizes; of a whole model, its Config
    params: Mapping[str, Any]


def open_manager(folder: Path, **options: Any) -> "ocp.CheckpointManager":
    """Orbax's manager of the checkpoints in `folder`, with its CheckpointManagerOptions.

    Of all items that any checkpoint has, whoever reads or writes which: what has no handler Orbax warns of.
    """
    import orbax.checkpoint as ocp

    handlers = ocp.handlers.DefaultCheckpointHandlerRegistry()
    for items, handler, arguments in (
        (ARRAYS, ocp.StandardCheckpointHandler, (ocp.args.StandardSave, ocp.args.StandardRestore)),
        (NOTES, ocp.JsonCheckpointHandler, (ocp.args.JsonSave, ocp.args.JsonRestore)),
    ):
        for item in items:
            own = handler()
            for kind in arguments:
                handlers.add(item, kind, own)
    # By name, because intact.py relies on it: a checkpoint is complete when it has its final name.
    # Orbax 1.0 will have what is orbax.checkpoint.v1 today in the place of all this. That reads these checkpoints, but
    # has no call of post_finalization_callback (0.12.8 takes one there, without effect), by which train/checkpoint.py
    # adds the checksums before a checkpoint gets that name.
    atomicity = ocp.options.AtomicityOptions(mode=ocp.options.AtomicityMode.ATOMIC_RENAME)
    return ocp.CheckpointManager(
        folder.absolute(),
        options=ocp.CheckpointManagerOptions(atomicity_options=atomicity, **options),
        handler_registry=handlers,
    )


def check_free(folder: Path) -> None:
    """Raises WeightsError where the folder already holds weights, or where nothing could be written into it."""
    try:
        if any((folder / name).exists() for name in (CHECKPOINTS, NOTE, TOKENIZER, MODEL)):
            raise WeightsError(f"{folder}: already holds weights; give another folder")
        try_folder(folder)
    except OSError as error:
        raise WeightsError(f"{folder}: no weights can be written there: {error.strerror}") from error


@contextmanager
def _whole(folder: Path, parts: Sequence[str]) -> Iterator[Path]:
    """A folder to write the parts into, which then move to `folder`: all, or none.

    The last of them is what makes it a folder that holds something.
    """
    check_free(folder)
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    moved: list[Path] = []
    try:
        with tempfile.TemporaryDirectory(prefix=".part.", dir=folder) as name:
            yield Path(name)
            for part in parts:
                if (Path(name) / part).exists():
                    os.replace(Path(name) / part, folder / part)
                    moved.append(folder / part)
    except BaseException:
        for path in moved:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if is_new and not any(folder.iterdir()):
            folder.rmdir()
        raise


def save(folder: Path, converted: Converted, note: Mapping[str, Any], tokenizer: Path | None = None) -> None:
    """Writes the checkpoint and the note of where it comes from, both or neither. `note`: source, files, licence, …

    `tokenizer`: a folder to copy beside them.
    """
    with _whole(folder, (NOTE, TOKENIZER, CHECKPOINTS)) as part:
        _write(part, converted, note, tokenizer)


def holds_model(folder: Path) -> bool:
    return bool(intact.steps(folder / CHECKPOINTS)) or is_portable(folder)


def is_portable(folder: Path) -> bool:
    return (folder / MODEL).is_file() and not intact.steps(folder / CHECKPOINTS)


def save_portable(
    folder: Path, whole: Converted, step: int, dtype: str = "float32", tokenizer: Path | None = None
) -> None:
    """A whole model as config.json, model.safetensors (numbers rounded to `dtype`) and their checksums.

    `tokenizer`: a folder whose files go beside them, as tokenizer/, which is then the config's `data.tokenizer`.

    Raises WeightsError where the folder holds a model already, or cannot be written.
    """
    config = dict(whole.config)
    if tokenizer is not None:
        config["data"] = {**config["data"], "tokenizer": TOKENIZER}
    flat: Mapping[str, Any] = flatten_dict(dict(whole.params), sep="/")
    # In C's order: safetensors writes another one as it lies, under a header that says C.
    arrays = {name: np.ascontiguousarray(leaf, jax.numpy.dtype(dtype)) for name, leaf in flat.items()}
    try:
        with _whole(folder, (CONFIG, intact.MANIFEST, TOKENIZER, MODEL)) as part:
            with replacing(part / MODEL) as file:
                save_file(arrays, file, metadata={"step": str(step)})
            write_json(part / CONFIG, config)
            if tokenizer is not None:
                copy_tokenizer(tokenizer, part / TOKENIZER)
            intact.write_manifest(part)
    except SafetensorError as error:
        raise WeightsError(f"{folder}: cannot be written: {error}") from error


def copy_tokenizer(folder: Path, out: Path) -> None:
    out.mkdir(exist_ok=True)
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)


def copy_portable(folder: Path, out: Path) -> None:
    """All files of a portable model, and its card, into a folder that is new or empty: all, or none.

    Raises WeightsError where they are damaged.
    """
    _check_sums(folder)
    with _whole(out, (CONFIG, intact.MANIFEST, TOKENIZER, CARD, MODEL)) as part:
        for name in (CONFIG, intact.MANIFEST, CARD, MODEL):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, part / name)
        if (folder / TOKENIZER).is_dir():
            copy_tokenizer(folder / TOKENIZER, part / TOKENIZER)


def _check_sums(folder: Path) -> None:
    """Raises WeightsError where a file that `load` reads is not what was written, or has no checksum."""
    try:
        intact.compare(folder, (CONFIG, MODEL, TOKENIZER))
        listed = json.loads((folder / intact.MANIFEST).read_bytes())
    except intact.DamagedError as error:
        raise WeightsError(f"{folder}: what it holds is damaged: {error}") from error
    tokenizer = (f"{TOKENIZER}/{name}" for name in TOKENIZER_FILES)
    for name in (CONFIG, MODEL, *(name for name in tokenizer if (folder / name).is_file())):
        if name not in listed:
            raise WeightsError(f"{folder}: what it holds is damaged: {intact.MANIFEST} has no checksum of {name}")


def read_portable(folder: Path) -> tuple[dict[str, Any], dict[str, Any], int]:
    """(config, parameters in float32, step) of `save_portable`. Raises WeightsError where they are damaged."""
    _check_sums(folder)
    try:
        with safe_open(folder / MODEL, "numpy") as file:
            step = int(file.metadata()["step"])
        arrays = {name: leaf.astype(np.float32) for name, leaf in load_file(folder / MODEL).items()}
        params = unflatten_dict(arrays, sep="/")
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{folder}: what it holds is damaged: {error}") from error
    return _portable_config(folder), params, step


def _portable_config(folder: Path) -> dict[str, Any]:
    """With the tokenizer where it lies; without what may be of another's machine, or meant for this one: its devices
    and processes, and folders to write to."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{folder / CONFIG}: is damaged: {error}") from error
    if not isinstance(config, dict):
        raise WeightsError(f"{folder / CONFIG}: is damaged: it is no object of fields")
    data, predict = (config.setdefault(section, {}) for section in ("data", "predict"))
    if not isinstance(data, dict) or not isinstance(predict, dict):
        raise WeightsError(f"{folder / CONFIG}: is damaged: data or predict is no object of fields")
    for section, field in ((config, "mesh"), (data, "scenes_dir"), (predict, "output")):
        section.pop(field, None)
    if data.get("tokenizer") == TOKENIZER and (folder / TOKENIZER).is_dir():
        data["tokenizer"] = str((folder / TOKENIZER).absolute())
    return config


def _write(folder: Path, converted: Converted, note: Mapping[str, Any], tokenizer: Path | None) -> None:
    import orbax.checkpoint as ocp

    with open_manager(folder / CHECKPOINTS, create=True) as manager:
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
    import orbax.checkpoint as ocp

    item = _item(folder, step)
    with open_manager(folder / CHECKPOINTS, create=False) as manager:
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        template = _shapes(folder / CHECKPOINTS / str(step) / item, device)
        restored = manager.restore(
            step,
            args=ocp.args.Composite(**{item: ocp.args.StandardRestore(template)}, config=ocp.args.JsonRestore()),
        )
    return restored["config"], restored[item]


def _shapes(item: Path, sharding: Any = None) -> Any:
    """Of the arrays of one item of a checkpoint: a manager would look at the optimizer's too, for most of the time."""
    import orbax.checkpoint as ocp

    path: Any = item.absolute()  # for which Orbax has a type of its own
    metadata = ocp.StandardCheckpointHandler().metadata(path).tree
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), metadata)


def _item(folder: Path, step: int) -> str:
    return "average" if (folder / CHECKPOINTS / str(step) / "average").is_dir() else "params"


def read_config(folder: Path, kind: str) -> dict[str, Any]:
    """The config alone of what `load` reads. Raises WeightsError where there is nothing of that kind.

    Without Orbax, which would ask for JAX's devices: config files read configs, before the processes of a run are one.
    """
    _require_kind(folder, kind)
    if is_portable(folder):
        return _portable_config(folder)
    file = folder / CHECKPOINTS / str(_newest(folder, "config")) / "config" / "metadata"  # of Orbax's JsonSave
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{file}: is damaged: {error}") from error


def read_shapes(folder: Path, kind: str) -> Converted:
    """What `load` gives, with shapes in the place of arrays. Raises WeightsError as it does."""
    _require_kind(folder, kind)
    if is_portable(folder):
        whole = load(folder, kind)
        return replace(
            whole, params=jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), whole.params)
        )
    import orbax.checkpoint as ocp

    step = _newest(folder, "params", "average", "config")
    with open_manager(folder / CHECKPOINTS, create=False) as manager:
        restored = manager.restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore()))
    return Converted(kind, restored["config"], _shapes(folder / CHECKPOINTS / str(step) / _item(folder, step)))


def load(folder: Path, kind: str) -> Converted:
    """What `save` or `save_portable` wrote, or the newest checkpoint of a training run, which is a whole model.

    Raises WeightsError where there is nothing of that kind.
    """
    _require_kind(folder, kind)
    if is_portable(folder):
        return Converted(kind, *read_portable(folder)[:2])
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
    """The note of a folder of converted weights; a training run or a portable model is one of kind "opendet".

    Raises WeightsError where there are no weights, or the note is damaged.
    """
    if is_portable(folder):
        return {"kind": "opendet"}
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
