"""What a checkpoint and the config that goes on from it must have in common."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from opendet_jax.config import Config
from opendet_jax.errors import InputError

# A run goes on only with the config it began with, but for what changes none of its numbers.
FREE_IN_TRAINING = (
    *("name", "init.", "eval.", "predict."),
    *("data.name", "data.eval.", "data.scenes_dir", "data.scenes_eval", "data.text_table", "data.max_unreadable"),
    *("data.max_pixels", "data.max_unwritable", "data.held_out_by", "data.threads", "data.prefetch"),
    *("data.eval_short_side", "model.normalise_prompts_at_inference"),
    *("train.steps", "train.log_every", "train.checkpoint_every", "train.eval_every"),
    *("train.keep_checkpoints", "train.keep_best", "train.non_finite", "train.replay"),
    *("mesh.", "model.remat"),
)
BEFORE = {"data.held_out_by": "images"}  # what versions did that had no such field
PATHS = (".annotations", ".images")  # of data sets, which may lie elsewhere

# Fields that shape the parameters or the meaning of a name's tokens, …
BOUND_IN_EVALUATION = ("model.", "ablation.", "data.tokenizer", "data.text_embeddings")
# … but not which queries are kept, what enters T5, how numbers are computed.
CHOSEN_IN_EVALUATION = tuple(
    f"model.{name}"
    for name in (
        *("max_queries", "min_queries", "score_threshold", "query_fill"),
        *("normalise_prompts_at_inference", "dtype", "remat", "remat_keeps"),
    )
)

Bound = Callable[[str], bool]


class CheckpointError(InputError):
    """A checkpoint that is missing, damaged, of another config, or that cannot be written."""


def in_training(field: str) -> bool:
    """Whether a run is bound to the value of a field (by its dotted name)."""
    return not field.startswith(FREE_IN_TRAINING) and not field.endswith(PATHS)


def in_evaluation(field: str) -> bool:
    """Whether the parameters are bound to the value of a field."""
    return field.startswith(BOUND_IN_EVALUATION) and field not in CHOSEN_IN_EVALUATION


def check_same(saved: dict[str, Any], config: Config, where: Path | str, bound: Bound = in_training) -> None:
    """Raises CheckpointError listing every bound field in which the configs differ.

    A field that is newer than the checkpoint counts as its default, with which nothing changed, or as in BEFORE.
    """
    old, new = (
        _with_held_out(fields)
        for fields in (_flat(Config().to_dict()) | BEFORE | _flat(saved), _flat(config.to_dict()))
    )
    lines = [
        f"  {name}: checkpoint {old.get(name, '(absent)')!r}, config {new.get(name, '(absent)')!r}"
        for name in sorted(old.keys() | new.keys())
        if bound(name) and old.get(name) != new.get(name)
    ]
    if lines:
        raise CheckpointError(f"{where} was made by another config:\n" + "\n".join(lines))


def as_written(saved: dict[str, Any]) -> dict[str, Any]:
    """A saved config with what its version did where it has no such field."""
    return {**saved, "data": {"held_out_by": BEFORE["data.held_out_by"]} | saved.get("data", {})}


def check_began(saved: dict[str, Any], config: Config, where: Path) -> None:
    """Raises CheckpointError where `init` names other weights than the run of a checkpoint began with: as the run goes
    on from the checkpoint, they could not act."""
    begun = saved.get("init", {})
    for name, folder in asdict(config.init).items():
        before = begun.get(name, "")
        if folder and not (before and Path(folder).resolve() == Path(before).resolve()):
            raise CheckpointError(
                f"config.init.{name} = {folder!r} cannot act: the run goes on from {where}, and began with "
                f"{repr(before) if before else 'none'}; another --workdir begins anew, "
                f"--config.init.{name}= goes on without it"
            )


def _with_held_out(fields: dict[str, Any]) -> dict[str, Any]:
    """And the share of the training images that is not trained on, which depends on a path that is free."""
    applies = fields["data.source"] == "json" and not fields["data.eval.annotations"]
    share, by = fields["data.held_out"], fields["data.held_out_by"]
    return fields | {
        "data.held_out (where data.eval names no json)": share if applies else 0,
        "where something is held out, data.held_out_by": by if applies and share else "",
    }


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Every field by its dotted name; those of the sections in a list by their number."""
    fields = {}
    for key, value in json.loads(json.dumps(values)).items():  # tuples become lists, as in the saved json
        sections = isinstance(value, list) and value and all(isinstance(item, dict) for item in value)
        if prefix + key == "data.mixture" and not value:
            continue  # a mixture that there is has a field for each of its parts, and none of this name
        if isinstance(value, dict):
            fields |= _flat(value, f"{prefix}{key}.")
        elif sections:
            for number, item in enumerate(value):
                fields |= _flat(item, f"{prefix}{key}.{number}.")
        else:
            fields[prefix + key] = value
    return fields
