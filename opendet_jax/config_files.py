"""Files of configs/ and their overrides, as every command takes them: read, checked, hashed, and one line for what is
wrong with them."""

import argparse
import dataclasses
import difflib
import itertools
import math
import operator
import re
import sys
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
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


# Of numbers, and of each number of several.
AT_LEAST = {
    -1: "optimizer.freeze_head_steps optimizer.freeze_embedding_steps eval.checkpoint",
    0: """model.encoder_layers model.one_to_many_layers model.denoising_queries model.distiller_blocks
        model.t5.lora_rank data.train_limit data.threads data.prefetch optimizer.warmup_steps train.seed train.log_every
        train.checkpoint_every train.eval_every eval.limit eval.max_detections eval.pictures""",
    1: """model.backbone.embed_dim model.backbone.depths model.backbone.num_heads model.backbone.window_size model.width
        model.text_width model.num_heads model.num_points model.ffn_width model.one_to_one_layers model.min_queries
        model.denoising_labels model.distiller_points model.distiller_hidden model.t5.vocab_size model.t5.num_layers
        model.t5.num_heads model.t5.head_width model.t5.ffn_width data.max_objects data.batch_size data.max_pixels
        data.scenes_train data.scenes_eval data.train_short_sides data.crop_short_sides data.eval_short_side
        data.max_long_side optimizer.decay_steps train.steps train.accumulate train.keep_checkpoints eval.batch_size
        eval.num_beams eval.max_new_tokens predict.max_detections predict.batch_size""",
    2: "data.max_name_tokens",
    4: "model.t5.relative_buckets",
    32: "data.scenes_size",
}
BETWEEN_0_AND_1 = """data.flip_probability data.crop_probability data.max_unreadable data.max_unwritable
    loss.text_noise_probability optimizer.weight_decay eval.min_score predict.min_score"""
BELOW_1 = """model.backbone.drop_path_rate model.t5.dropout model.distiller_dropout model.prompt_dropout
    model.generator_dropout data.held_out train.ema"""
ABOVE_0 = """optimizer.detector_rate optimizer.backbone_rate optimizer.generator_rate eval.nms_iou predict.nms_iou"""


def validate(config: Config) -> None:
    """Refuses values that cannot work. Raises ConfigError naming the field and the value."""
    _validate_numbers(config)
    model, data, optimizer, t5 = config.model, config.data, config.optimizer, config.model.t5
    _require(model.width % 32 == 0, "model.width", model.width, "a multiple of 32 (GroupNorm has 32 groups)")
    _require(model.width % model.num_heads == 0, "model.num_heads", model.num_heads, "a divisor of model.width")
    _require(model.text_width % 2 == 0, "model.text_width", model.text_width, "even")
    swin = model.backbone
    _require(len(swin.depths) == 4, "model.backbone.depths", swin.depths, "four numbers, one a stage")
    widths = [swin.embed_dim * 2**i for i in range(4)]
    divide = len(swin.num_heads) == 4 and not any(map(operator.mod, widths, swin.num_heads))
    _require(divide, "model.backbone.num_heads", swin.num_heads, f"four divisors of the stages' widths {widths}")
    _require(0 < model.score_threshold < 1, "model.score_threshold", model.score_threshold, "between 0 and 1")
    wanted = f"at most model.max_queries = {model.max_queries}"
    _require(model.min_queries <= model.max_queries, "model.min_queries", model.min_queries, wanted)
    least = t5.relative_buckets // 2 + 1
    wanted = f"above half of relative_buckets, at least {least}"
    _require(t5.relative_max_distance >= least, "model.t5.relative_max_distance", t5.relative_max_distance, wanted)
    cosine = config.loss.name_mask_threshold
    _require(-1 <= cosine <= 1, "loss.name_mask_threshold", cosine, "a cosine, between −1 and 1")
    for name, least in (("query_slots", 0), ("naming_chunks", 1)):
        sizes = getattr(config.eval, name)
        rising = all(a < b for a, b in itertools.pairwise((0, *sizes)))
        _require(rising and len(sizes) >= least, f"eval.{name}", sizes, "rising numbers from 1 on")
    _require(len(data.buckets) > 0, "data.buckets", data.buckets, "at least one (height, width)")
    for bucket in data.buckets:
        _require(not any(side % 32 or side <= 0 for side in bucket), "data.buckets", bucket, "multiples of 32")
    for name in ("train_short_sides", "crop_short_sides"):
        _require(len(getattr(data, name)) > 0, f"data.{name}", (), "at least one number of pixels")
    low, high = data.crop_range
    _require(0 < low <= high, "data.crop_range", data.crop_range, "two rising numbers of pixels")
    # A model's config may be a stranger's: it names a folder within the workdir and nothing else.
    is_one = data.name not in ("", ".", "..") and not set(data.name) & set("/\\\0")
    _require(is_one, "data.name", data.name, "the name of a folder, no path")
    weighted = [("train", data.train)] + [(f"mixture[{i}]", paths) for i, paths in enumerate(data.mixture)]
    for name, paths in weighted:
        _require(0 < paths.weight < math.inf, f"data.{name}.weight", paths.weight, "positive and finite")
    _require(data.eval.weight == 1, "data.eval.weight", data.eval.weight, "1: every image is evaluated once")
    table = "the .npy file of the embeddings (data.text_embeddings is 'table')"
    _require(data.text_embeddings != "table" or bool(data.text_table), "data.text_table", data.text_table, table)
    _require(optimizer.clip_norm > 0, "optimizer.clip_norm", optimizer.clip_norm, "positive")
    steps = optimizer.decay_steps
    _require(all(a < b for a, b in itertools.pairwise(steps)), "optimizer.decay_steps", steps, "rising numbers")
    both = config.init.model and (config.init.backbone or config.init.t5)
    wanted = "empty where init.backbone or init.t5 is given: a whole model holds both"
    _require(not both, "init.model", config.init.model, wanted)
    _require(config.train.seed < 2**32, "train.seed", config.train.seed, "below 2³²")
    parts, wanted = config.train.accumulate, f"a divisor of data.batch_size = {data.batch_size}"
    _require(data.batch_size % parts == 0, "train.accumulate", parts, wanted)
    best = config.train.keep_best
    if best and best not in METRICS:
        near = difflib.get_close_matches(best, METRICS, n=3) or ("AP", "AP50", "coco_AP", "agnostic_AP")
        raise ConfigError(f"config.train.keep_best = {best!r}: is no metric of an evaluation, as {', '.join(near)} are")
    _validate_mesh(config.mesh)
    encoder, clip = config.eval.text_encoder, "the folder of a converted CLIP (eval.name_mapping is 'text_encoder')"
    _require(config.eval.name_mapping != "text_encoder" or bool(encoder), "eval.text_encoder", encoder, clip)


def _validate_numbers(config: Config) -> None:
    """Those of the tables above, on which a program would stumble late, or go wrong without a word."""
    fields = dict(_fields(config))
    for name, value in fields.items():
        _require(not isinstance(value, float) or math.isfinite(value), name, value, "a finite number")
    for least, names in AT_LEAST.items():
        for name in names.split():
            every = value if isinstance(value := fields[name], tuple) else (value,)
            _require(all(number >= least for number in every), name, value, f"at least {least}")
    for name in BETWEEN_0_AND_1.split():
        _require(0 <= fields[name] <= 1, name, fields[name], "between 0 and 1")
    for name in BELOW_1.split():
        _require(0 <= fields[name] < 1, name, fields[name], "a share of at least 0 and below 1")
    for name in ABOVE_0.split():
        _require(0 < fields[name] <= 1, name, fields[name], "positive and at most 1")


def _fields(section: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every field of the sections, by its dotted name."""
    for field in dataclasses.fields(section):
        name, value = prefix + field.name, getattr(section, field.name)
        yield from _fields(value, f"{name}.") if dataclasses.is_dataclass(value) else [(name, value)]


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
