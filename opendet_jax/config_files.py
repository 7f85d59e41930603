"""Files of configs/ and their overrides, as every command takes them: read, checked, hashed, and one line for what is
wrong with them."""

import argparse
import dataclasses
import difflib
import hashlib
import itertools
import json
import math
import re
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from absl import flags
from ml_collections import ConfigDict, config_flags

from opendet_jax.config import YAML, Config, ConfigError, DatasetPaths, MeshConfig, split_of

# Beside the package where it is worked on, inside of it where it is installed.
CONFIGS = next(
    path for path in (Path(__file__).parent / "configs", Path(__file__).parents[1] / "configs") if path.is_dir()
)

# What an evaluation measures (evaluate/protocols.py, evaluate/localisation.py); larger is better.
_ALL = ("AP", "AP50", "AP75", "APs", "APm", "APl", "ARs", "ARm", "ARl")
METRICS = (
    *(prefix + name for prefix in ("", "fixed_") for name in (*_ALL, "AR", "APr", "APc", "APf", "APu")),
    *("coco_" + name for name in (*_ALL, "AR1", "AR10", "AR100")),
    *("agnostic_" + name for name in ("AP", "AP50", "AP75", "AR", "ARs", "ARm", "ARl")),
    *("recall50", "naming_accuracy", "exact_name_accuracy", "synonym_accuracy"),
)

WITHOUT_DATA = """
  Your own:                                  --config.data.train.annotations=mine.json --config.data.train.images=photos
  Visual Genome (15 GB), COCO, LVIS (19 GB): docs/data.md has the commands that get and prepare them
  Nothing to download, the full-size model:  --config=configs/swin_t.py:scenes
  Nothing to download, one that soon learns: --config=configs/scenes_tiny.py"""


def find_config(given: str) -> str:
    """What --config names, FILE or FILE:VARIANT; where no such file is there, that of configs/: swin_t, swin_t:scenes.

    Raises ConfigError where there is neither.
    """
    name, colon, variant = given.partition(":")
    path = Path(name)
    if path.is_file():
        return given
    ours = {file.stem: file for file in sorted(CONFIGS.glob("*.py")) if file.stem != "__init__"}
    if path.stem in ours and path.suffix in ("", ".py") and str(path.parent) in (".", "configs"):
        return f"{ours[path.stem]}{colon}{variant}"
    raise ConfigError(
        f"--config={given}: there is no file {name}, and what comes with the program is {', '.join(ours)}"
    )


def find_configs(arguments: Sequence[str]) -> list[str]:
    """The arguments with the file that --config means in the place of its name. Raises ConfigError for none.

    From then on, `from configs import swin_t` finds ours in every config file, wherever the program was started, and
    before them those of a folder configs/ there.
    """
    package = sys.modules.setdefault("configs", ModuleType("configs"))
    package.__path__ = [
        *dict.fromkeys([str(Path("configs").absolute()), *getattr(package, "__path__", ()), str(CONFIGS)])
    ]
    found: list[str] = []
    for place, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if flag.lstrip("-") == "config" and flag.startswith("-") and equals:
            argument = f"{flag}={find_config(value)}"
        elif place and arguments[place - 1] in ("-config", "--config"):
            argument = find_config(argument)
        found.append(argument)
    return found


def config_from_arguments(arguments: Sequence[str]) -> Config:
    """`--config=configs/minilvis.py --config.train.seed=1 …` as a validated Config.

    Raises ConfigError for a missing file, an argument that is none of these, and a field that does not exist.
    """
    values, command = flags.FlagValues(), ["", *find_configs(arguments)]
    flag = config_flags.DEFINE_config_file("config", None, flag_values=values, lock_config=True, sys_argv=command)
    try:
        unknown = values(command)[1:]
    except (AttributeError, KeyError, flags.Error) as error:
        raise ConfigError(flag_problem(error)) from error
    if unknown:
        raise ConfigError(f"{unknown[0]!r} is no argument: fields of the config are set by --config.<field>=<value>")
    return read_flag(flag)


def read_flag(flag: flags.FlagHolder) -> Config:
    """The Config of a --config flag. Raises ConfigError, also where there is none or its file is missing."""
    if flag.value is None:
        raise ConfigError("--config is missing: name a file of configs/ (evaluation and prediction: or --workdir)")
    try:
        sections = dict(flag.value.items())
    except OSError as error:  # put off by ml_collections until here
        cause = error.__cause__ or error
        raise ConfigError("--config: " + str(cause).strip().splitlines()[-1].strip()) from error
    return parse_config(sections)


def flag_problem(error: Exception) -> str:
    """What was wrong with the arguments, for someone at a keyboard."""
    if not isinstance(error, flags.Error):
        said = str(error.args[0])  # of ml_collections, quoted up to three times
        asked = re.search(r"\w+", said.replace("\\n", "\n"))
        near = re.search(r'Did you mean "([^"]+)"', said)
        return f"a --config field does not exist: {asked[0] if asked else said}" + (
            f"; did you mean {near[1]}?" if near else ""
        )
    refused = re.search(r"^opendet_jax\.[\w.]+: (.*)", str(error), re.MULTILINE | re.DOTALL)  # at a traceback's end
    return refused[1].strip() if refused else str(error)


def at_least(least: int) -> Callable[[str], int]:
    """What argparse takes as the type of a whole number that is not smaller."""

    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is less than {least}")
        return value

    return number


def parse_config(values: Mapping[str, Any] | ConfigDict) -> Config:
    """Builds and validates a Config. Raises ConfigError naming the field, and the nearest right name if unknown."""
    config = _build(Config, values, "config")
    validate(config)
    return config


def check_paths(config: Config, mode: str) -> None:
    """Raises ConfigError where a file or folder that a mode of the program needs is not named, or not there."""
    data = config.data
    trains = mode == "train"
    if mode == "replay":
        wanted = "the file of a batch, which training writes to <workdir>/non_finite/ where a step is not finite"
        _require(Path(config.train.replay).is_file(), "train.replay", config.train.replay, wanted)
    if mode == "predict":
        _require(bool(config.predict.inputs), "predict.inputs", config.predict.inputs, "a path or a glob of images")
    if mode not in ("train", "eval"):
        return
    if data.source == "json":
        sections = [("eval", data.eval)] if data.eval.annotations else []
        if trains or not sections:
            sections.append(("train", data.train))
        if trains:
            sections += [(f"mixture[{i}]", paths) for i, paths in enumerate(data.mixture)]
        for name, paths in sections:
            _check_data_set(f"data.{name}", paths)
    if trains and data.text_embeddings == "table":
        _require(Path(data.text_table).is_file(), "data.text_table", data.text_table, "a file that is there")
    if config.eval.name_mapping == "text_encoder" or config.eval.alignment_analysis:
        encoder = config.eval.text_encoder
        _require(not encoder or Path(encoder).is_dir(), "eval.text_encoder", encoder, "a folder that is there")


def _check_data_set(name: str, paths: DatasetPaths) -> None:
    if not paths.annotations:
        recipe = WITHOUT_DATA if name == "data.train" else ""
        raise ConfigError(f"config.{name}.annotations is empty: name a json, a data.yaml or a folder{recipe}")
    annotations, _ = split_of(paths.annotations)
    wanted = "a json, a data.yaml or a folder that is there"
    _require(annotations.exists(), f"{name}.annotations", paths.annotations, wanted)
    if not annotations.is_dir() and (paths.images or annotations.suffix not in YAML):
        is_there = bool(paths.images) and Path(paths.images).is_dir()
        _require(is_there, f"{name}.images", paths.images, "the folder of the pictures, one that is there")


def config_hash(config: Config) -> str:
    """Twelve letters that stand for every value of the config."""
    text = json.dumps(config.to_dict(), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def validate(config: Config) -> None:
    """Refuses values that cannot work. Raises ConfigError naming the field and the value."""
    model, data, optimizer = config.model, config.data, config.optimizer
    _require(model.width % 32 == 0, "model.width", model.width, "a multiple of 32 (GroupNorm has 32 groups)")
    _require(model.width % model.num_heads == 0, "model.num_heads", model.num_heads, "a divisor of model.width")
    _require(model.text_width % 2 == 0, "model.text_width", model.text_width, "even")
    swin = model.backbone
    _require(len(swin.depths) == 4, "model.backbone.depths", swin.depths, "four numbers, one a stage")
    _require(
        len(swin.num_heads) == 4 and all(swin.embed_dim * 2**i % heads == 0 for i, heads in enumerate(swin.num_heads)),
        "model.backbone.num_heads",
        swin.num_heads,
        f"four divisors of the stages' widths {[swin.embed_dim * 2**i for i in range(4)]}",
    )
    _require(model.one_to_one_layers >= 1, "model.one_to_one_layers", model.one_to_one_layers, "at least 1")
    _require(0 < model.score_threshold < 1, "model.score_threshold", model.score_threshold, "between 0 and 1")
    _require(
        model.min_queries <= model.max_queries,
        "model.min_queries",
        model.min_queries,
        f"at most model.max_queries = {model.max_queries}",
    )
    _require(model.denoising_queries >= 0, "model.denoising_queries", model.denoising_queries, "0 (none) or a number")
    rates = {"backbone.drop_path_rate": swin.drop_path_rate, "t5.dropout": model.t5.dropout}
    rates |= {name: getattr(model, name) for name in ("distiller_dropout", "prompt_dropout", "generator_dropout")}
    for name, rate in rates.items():
        _require(0 <= rate < 1, f"model.{name}", rate, "a share of at least 0 and below 1")
    _require(data.max_objects >= 1, "data.max_objects", data.max_objects, "at least 1")
    _require(data.batch_size >= 1, "data.batch_size", data.batch_size, "at least 1")
    _require(config.eval.batch_size >= 1, "eval.batch_size", config.eval.batch_size, "at least 1")
    for name, least in (("query_slots", 0), ("naming_chunks", 1)):
        sizes = getattr(config.eval, name)
        rising = all(a < b for a, b in itertools.pairwise((0, *sizes)))
        _require(rising and len(sizes) >= least, f"eval.{name}", sizes, "rising numbers from 1 on")
    _require(data.max_name_tokens >= 2, "data.max_name_tokens", data.max_name_tokens, "at least 2")
    _require(len(data.buckets) > 0, "data.buckets", data.buckets, "at least one (height, width)")
    for height, width in data.buckets:
        _require(
            height % 32 == 0 and width % 32 == 0 and height > 0 and width > 0,
            "data.buckets",
            (height, width),
            "multiples of 32",
        )
    low, high = data.crop_range
    _require(0 < low <= high, "data.crop_range", data.crop_range, "two rising numbers of pixels")
    _require(data.scenes_size >= 32, "data.scenes_size", data.scenes_size, "at least 32 pixels")
    for name, least in (("scenes_train", 1), ("scenes_eval", 1), ("threads", 0), ("prefetch", 0), ("max_pixels", 1)):
        _require(getattr(data, name) >= least, f"data.{name}", getattr(data, name), f"at least {least}")
    for name in ("flip_probability", "crop_probability", "max_unreadable", "max_unwritable"):
        value = getattr(data, name)
        _require(0 <= value <= 1, f"data.{name}", value, "between 0 and 1")
    _require(0 <= data.held_out < 1, "data.held_out", data.held_out, "0 (nothing) or a share below 1")
    weighted = [("train", data.train)] + [(f"mixture[{i}]", paths) for i, paths in enumerate(data.mixture)]
    for name, paths in weighted:
        _require(paths.weight > 0, f"data.{name}.weight", paths.weight, "positive")
    _require(data.eval.weight == 1, "data.eval.weight", data.eval.weight, "1: every image is evaluated once")
    table = "the .npy file of the embeddings (data.text_embeddings is 'table')"
    _require(data.text_embeddings != "table" or bool(data.text_table), "data.text_table", data.text_table, table)
    for name in ("detector_rate", "backbone_rate", "generator_rate"):
        value = getattr(optimizer, name)
        _require(0 < value <= 1, f"optimizer.{name}", value, "positive and at most 1")
    decay = optimizer.weight_decay
    _require(0 <= decay <= 1, "optimizer.weight_decay", decay, "between 0 and 1")
    _require(0 < optimizer.clip_norm < math.inf, "optimizer.clip_norm", optimizer.clip_norm, "positive and finite")
    for name in ("freeze_head_steps", "freeze_embedding_steps"):
        value = getattr(optimizer, name)
        _require(value >= -1, f"optimizer.{name}", value, "−1 (the whole run), 0 (never) or a number of steps")
    _require(
        not (config.init.model and (config.init.backbone or config.init.t5)),
        "init.model",
        config.init.model,
        "empty where init.backbone or init.t5 is given: a whole model holds both",
    )
    _require(config.train.steps >= 1, "train.steps", config.train.steps, "at least 1")
    for name in ("log_every", "checkpoint_every", "eval_every"):
        value = getattr(config.train, name)
        _require(value >= 0, f"train.{name}", value, "0 (only at the end) or more")
    parts = config.train.accumulate
    _require(
        parts >= 1 and data.batch_size % parts == 0,
        "train.accumulate",
        parts,
        f"a divisor of data.batch_size = {data.batch_size}",
    )
    _require(0 <= config.train.ema < 1, "train.ema", config.train.ema, "0 (none) or a decay below 1")
    best = config.train.keep_best
    if best and best not in METRICS:
        near = difflib.get_close_matches(best, METRICS, n=3) or ("AP", "AP50", "coco_AP", "agnostic_AP")
        raise ConfigError(f"config.train.keep_best = {best!r}: is no metric of an evaluation, as {', '.join(near)} are")
    _validate_mesh(config.mesh)
    _require(config.train.keep_checkpoints >= 1, "train.keep_checkpoints", config.train.keep_checkpoints, "at least 1")
    _require(config.eval.num_beams >= 1, "eval.num_beams", config.eval.num_beams, "at least 1")
    _require(config.eval.max_new_tokens >= 1, "eval.max_new_tokens", config.eval.max_new_tokens, "at least 1")
    for section, fields in (("eval", config.eval), ("predict", config.predict)):
        _require(0 < fields.nms_iou <= 1, f"{section}.nms_iou", fields.nms_iou, "above 0, at most 1")
        _require(0 <= fields.min_score <= 1, f"{section}.min_score", fields.min_score, "between 0 and 1")
    _require(config.eval.max_detections >= 0, "eval.max_detections", config.eval.max_detections, "0 (all) or a number")
    _require(config.predict.max_detections >= 1, "predict.max_detections", config.predict.max_detections, "at least 1")
    encoder = config.eval.text_encoder
    _require(config.predict.batch_size >= 1, "predict.batch_size", config.predict.batch_size, "at least 1")
    clip = "the folder of a converted CLIP (eval.name_mapping is 'text_encoder')"
    _require(config.eval.name_mapping != "text_encoder" or bool(encoder), "eval.text_encoder", encoder, clip)
    for name, limit in (("data.train_limit", data.train_limit), ("eval.limit", config.eval.limit)):
        _require(limit >= 0, name, limit, "0 (all) or a number of images")


def _validate_mesh(mesh: MeshConfig) -> None:
    sizes = {"data": mesh.data, "fsdp": mesh.fsdp, "tensor": mesh.tensor}
    for name, size in sizes.items():
        _require(size >= 1 or size == -1, f"mesh.{name}", size, "a number of devices, or −1 for all that are left")
    _require(list(sizes.values()).count(-1) <= 1, "mesh", tuple(sizes.values()), "of sizes of which one at most is −1")
    _require(mesh.processes >= 0, "mesh.processes", mesh.processes, "a number, or 0 for what the cluster says")
    if mesh.processes > 1:
        _require(
            0 <= mesh.process < mesh.processes,
            "mesh.process",
            mesh.process,
            f"this process's number, 0 … {mesh.processes - 1}",
        )
        _require(":" in mesh.coordinator, "mesh.coordinator", mesh.coordinator, "host:port of process 0")


def _require(holds: bool, name: str, value: Any, wanted: str) -> None:
    if not holds:
        raise ConfigError(f"config.{name} = {value!r}: must be {wanted}")


def _build(cls: type, values: Mapping[str, Any] | ConfigDict, where: str) -> Any:
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1)
            hint = f"; did you mean {where}.{near[0]}?" if near else f"; it has {', '.join(hints)}"
            raise ConfigError(f"{where}.{key} does not exist{hint}")
    return cls(**{key: _convert(hints[key], value, f"{where}.{key}") for key, value in values.items()})


def _convert(kind: Any, value: Any, where: str) -> Any:
    """`value` as the annotated type: sections become dataclasses, lists tuples, whole numbers floats."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if not isinstance(value, Mapping | ConfigDict):
            raise ConfigError(f"{where} = {value!r}: must be a section of fields")
        return _build(kind, dict(value.items()), where)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(f"{where} = {value!r}: must be one of {', '.join(map(repr, arguments))}")
        return value
    if origin is tuple:
        if not isinstance(value, tuple | list):
            raise ConfigError(f"{where} = {value!r}: must be a tuple")
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
        if len(kinds) != len(value):
            raise ConfigError(f"{where} = {value!r}: must have {len(kinds)} entries")
        return tuple(_convert(k, v, where) for k, v in zip(kinds, value, strict=True))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    assert isinstance(kind, type), f"{where} is annotated with {kind}"
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{where} = {value!r}: must be {kind.__name__}, not {type(value).__name__}")
    return value
