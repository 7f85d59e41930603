"""What training starts from (`config.init`): converted weights in the place of random ones."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from absl import logging
from flax.traverse_util import flatten_dict

from opendet_jax.checkpoints.folder import Converted, load, read_shapes
from opendet_jax.checkpoints.restore import find_model
from opendet_jax.config import Config
from opendet_jax.errors import WeightsError
from opendet_jax.weights.rules import flat, nested

# Fields of ModelConfig that may differ from those of the weights: of training, of selection, or of parts that are new.
FREE = {
    *(
        "drop_path_rate",
        "dropout",
        "distiller_dropout",
        "prompt_dropout",
        "generator_dropout",
        "lora_rank",
        "lora_scale",
    ),
    *("max_queries", "min_queries", "score_threshold", "query_fill", "denoising_queries"),
    *("normalise_prompts_at_inference", "dtype", "remat", "remat_keeps"),
}

LISTED = 5  # parameters in a message
Reader = Callable[[Path, str], Converted]


def initialise(params: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """`params` with what the folders of `config.init` hold in their place.

    Raises:
        WeightsError: a folder holds something else, or a model of other sizes (each is named).
    """
    return _put(params, config, load)[0]


def check_start(shapes: Mapping[str, Any], config: Config) -> None:
    """Raises WeightsError as `initialise` would, from the shapes of the parameters: nothing is loaded.

    Logs which parameters a whole model does not have, a baseline that is to become Open-Det say: they stay random.
    """
    missing = _put(shapes, config, read_shapes)[1]
    if missing:
        listed = ", ".join(missing[:LISTED]) + (", …" if len(missing) > LISTED else "")
        logging.warning("%s has none of %d parameters, which begin random: %s", config.init.model, len(missing), listed)


def _put(params: Mapping[str, Any], config: Config, read: Reader) -> tuple[dict[str, Any], list[str]]:
    """The parameters, and the names of those that `init.model` does not have."""
    leaves, model = flat(params), config.model
    missing: list[str] = []
    if config.init.model:
        found = _part(read, find_model(config.init.model), "opendet", "", asdict(model), leaves)
        missing = [path for path in leaves if path not in found]
        leaves |= found
    if config.init.backbone:
        leaves |= _part(read, Path(config.init.backbone), "swin", "backbone/", asdict(model.backbone), leaves)
    if config.init.t5:
        sizes = {**asdict(model.t5), "text_width": model.text_width}
        leaves |= _part(read, Path(config.init.t5), "t5", "name_generator/t5/", sizes, leaves)
    return nested(leaves), missing


def _part(
    read: Reader, folder: Path, kind: str, prefix: str, sizes: Mapping[str, Any], leaves: Mapping[str, Any]
) -> dict[str, Any]:
    converted = read(folder, kind)
    theirs, ours = _sizes(converted.config.get("model", converted.config)), _sizes(sizes)
    differing = [
        f"  {name}: the weights {value!r}, the config {ours.get(name)!r}"
        for name, value in theirs.items()
        if value != ours.get(name)
    ]
    if differing:
        hint = "\nconfigs/coco_json.py takes a whole model's sizes from its folder" if kind == "opendet" else ""
        raise WeightsError(f"{folder}: is of other sizes than the config\n" + "\n".join(differing) + hint)
    found = {prefix + path: value for path, value in flat(converted.params).items()}
    wrong = [path for path, value in found.items() if path not in leaves or leaves[path].shape != value.shape]
    if wrong:
        raise WeightsError(f"{folder}: does not fit the model at {', '.join(wrong)}")
    return found


def _sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the shapes and the meaning of parameters depend on, by dotted name."""
    fields: Any = flatten_dict(dict(config), sep=".")
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}
    return {name: value for name, value in plain.items() if name.rpartition(".")[2] not in FREE}


def describe(config: Config) -> str:
    """What training starts from, in a line to print."""
    given = {name: folder for name, folder in asdict(config.init).items() if folder}
    if not given:
        return "STARTING FROM NOTHING: all parameters are random (config.init names weights to start from)"
    parts = [f"{name} from {folder}" for name, folder in given.items()]
    return "starting with " + ", ".join(parts) + ("" if "model" in given else "; the rest is random")
