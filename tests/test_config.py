"""Configs: every shipped file builds; wrong fields and values are refused by name; overrides on the command line."""

import dataclasses
import importlib
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from configs import swin_t
from opendet_jax.config import Config, ConfigError
from opendet_jax.config_files import METRICS, parse_config
from opendet_jax.evaluate.evaluator import Evaluator

SHIPPED = ["swin_t", "swin_s", "swin_l", "scenes_tiny", "minilvis", "coco_json", "generateu_t", "generateu_tiny"]


def shipped(name: str) -> Config:
    return parse_config(importlib.import_module(f"configs.{name}").get_config())


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_config_survives_a_round_trip_through_json(name):
    config = shipped(name)
    assert config.name == name
    assert parse_config(json.loads(json.dumps(config.to_dict()))) == config


def test_paper_values():
    config = shipped("swin_t")
    assert config.optimizer.weight_decay == 0.05
    assert (config.optimizer.detector_rate, config.optimizer.backbone_rate, config.optimizer.generator_rate) == (
        1e-4,
        1e-5,
        2e-4,
    )
    assert (config.optimizer.clip_norm, config.optimizer.decay_steps, config.train.steps) == (0.1, (250_000,), 300_000)
    assert (config.model.max_queries, config.model.score_threshold, config.data.batch_size) == (900, 0.05, 8)
    large = shipped("swin_l").model.backbone
    assert (large.embed_dim, large.depths, large.window_size) == (192, (2, 2, 18, 2), 12)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train": {"stps": 3}}, r"config\.train\.stps does not exist; did you mean config\.train\.steps\?"),
        ({"model": {"width": 100}}, r"config\.model\.width = 100: must be a multiple of 32"),
        ({"model": {"dtype": "float16"}}, r"config\.model\.dtype = 'float16'.*'float32', 'bfloat16'"),
        ({"train": {"steps": "many"}}, r"config\.train\.steps = 'many': must be int"),
        ({"train": {"steps": True}}, r"config\.train\.steps = True: must be int"),
        ({"train": 3}, r"config\.train = 3: must be a section"),
        ({"data": {"buckets": [[100, 128]]}}, r"config\.data\.buckets = \(100, 128\): must be multiples of 32"),
        ({"data": {"crop_range": [1, 2, 3]}}, r"config\.data\.crop_range = \[1, 2, 3\]: must have 2 entries"),
        ({"data": {"text_embeddings": "table"}}, r"config\.data\.text_table = ''"),
        ({"model": {"denoising_queries": -1}}, r"config\.model\.denoising_queries = -1: must be at least 0"),
        ({"model": {"min_queries": 901}}, r"config\.model\.min_queries = 901: must be at most"),
        ({"data": {"scenes_size": 16}}, r"config\.data\.scenes_size = 16: must be at least 32"),
        ({"data": {"train_limit": -1}}, r"config\.data\.train_limit = -1: must be at least 0"),
        ({"predict": {"min_score": 1.5}}, r"config\.predict\.min_score = 1\.5: must be between 0 and 1"),
        (
            {"model": {"t5": {"dropout": 1.5}}},
            r"config\.model\.t5\.dropout = 1\.5: must be a share of at least 0 and below 1",
        ),
        ({"model": {"backbone": {"drop_path_rate": 1.0}}}, r"config\.model\.backbone\.drop_path_rate = 1\.0: must be"),
        ({"model": {"distiller_dropout": -0.5}}, r"config\.model\.distiller_dropout = -0\.5: must be"),
        ({"model": {"prompt_dropout": float("nan")}}, r"config\.model\.prompt_dropout = nan: must be"),
        ({"model": {"generator_dropout": 1}}, r"config\.model\.generator_dropout = 1\.0: must be"),
        ({"train": {"keep_best": "None"}}, r"config\.train\.keep_best = 'None': is no metric of an evaluation, as AP"),
        ({"train": {"keep_best": "ap50"}}, r"config\.train\.keep_best = 'ap50': is no metric of an evaluation"),
        ({"data": {"max_unwritable": -0.1}}, r"config\.data\.max_unwritable = -0\.1: must be between 0 and 1"),
        ({"optimizer": {"clip_norm": 0}}, r"config\.optimizer\.clip_norm = 0\.0: must be positive"),
        ({"optimizer": {"clip_norm": math.inf}}, r"config\.optimizer\.clip_norm = inf: must be a finite number"),
        ({"optimizer": {"backbone_rate": 1e30}}, r"config\.optimizer\.backbone_rate = 1e\+30: must be positive and at"),
        ({"optimizer": {"weight_decay": -1.0}}, r"config\.optimizer\.weight_decay = -1\.0: must be between 0 and 1"),
        ({"optimizer": {"warmup_steps": -2}}, r"config\.optimizer\.warmup_steps = -2: must be at least 0"),
        ({"optimizer": {"decay_steps": [0, 5]}}, r"config\.optimizer\.decay_steps = \(0, 5\): must be at least 1"),
        ({"optimizer": {"decay_steps": [3, 3]}}, r"config\.optimizer\.decay_steps = \(3, 3\): must be rising numbers"),
        ({"train": {"seed": -1}}, r"config\.train\.seed = -1: must be at least 0"),
        ({"train": {"seed": 2**32}}, r"config\.train\.seed = 4294967296: must be below 2³²"),
        (
            {"loss": {"text_noise_probability": 7}},
            r"config\.loss\.text_noise_probability = 7\.0: must be between 0 and 1",
        ),
        (
            {"loss": {"name_mask_threshold": math.nan}},
            r"config\.loss\.name_mask_threshold = nan: must be a finite number",
        ),
        ({"loss": {"name_mask_threshold": 5}}, r"config\.loss\.name_mask_threshold = 5\.0: must be a cosine"),
        ({"model": {"num_points": 0}}, r"config\.model\.num_points = 0: must be at least 1"),
        ({"model": {"encoder_layers": -1}}, r"config\.model\.encoder_layers = -1: must be at least 0"),
        (
            {"model": {"backbone": {"depths": [1, 0, 1, 1]}}},
            r"config\.model\.backbone\.depths = \(1, 0, 1, 1\): must be at least 1",
        ),
        ({"model": {"backbone": {"window_size": 0}}}, r"config\.model\.backbone\.window_size = 0: must be at least 1"),
        ({"model": {"t5": {"lora_rank": -1}}}, r"config\.model\.t5\.lora_rank = -1: must be at least 0"),
        ({"model": {"t5": {"relative_buckets": 3}}}, r"config\.model\.t5\.relative_buckets = 3: must be at least 4"),
        (
            {"model": {"t5": {"relative_max_distance": 16}}},
            r"config\.model\.t5\.relative_max_distance = 16: must be above half of relative_buckets, at least 17",
        ),
        (
            {"data": {"name": "../../elsewhere"}},
            r"config\.data\.name = '\.\./\.\./elsewhere': must be the name of",
        ),
        ({"data": {"name": "/elsewhere"}}, r"config\.data\.name = '/elsewhere': must be the name of a folder"),
        ({"data": {"name": ".."}}, r"config\.data\.name = '\.\.': must be the name of a folder"),
        ({"data": {"name": ""}}, r"config\.data\.name = '': must be the name of a folder"),
        (
            {"data": {"mixture": [{"annotations": "a", "weight": math.inf}]}},
            r"config\.data\.mixture\[0\]\.weight = inf",
        ),
        ({"eval": {"checkpoint": -2}}, r"config\.eval\.checkpoint = -2: must be at least -1"),
        ({"eval": {"pictures": -1}}, r"config\.eval\.pictures = -1: must be at least 0"),
        ({"data": {"max_long_side": 0}}, r"config\.data\.max_long_side = 0: must be at least 1"),
        ({"data": {"eval_short_side": -1}}, r"config\.data\.eval_short_side = -1: must be at least 1"),
        (
            {"data": {"train_short_sides": []}},
            r"config\.data\.train_short_sides = \(\): must be at least one number of pixels",
        ),
        ({"data": {"crop_short_sides": [0]}}, r"config\.data\.crop_short_sides = \(0,\): must be at least 1"),
    ],
)
def test_wrong_values_are_named(values, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(values)


def test_the_metrics_that_may_be_kept_by_are_those_of_evaluations():
    found = set()
    for frequency in ({}, {"frequency": "r"}):  # COCO's form, LVIS's
        categories = [{"id": 1, "name": "a", **frequency}]
        image = {"id": 1, "width": 9, "height": 9, "neg_category_ids": [1], "not_exhaustive_category_ids": []}
        found |= Evaluator({"images": [image], "annotations": [], "categories": categories}).finish().metrics.keys()
    assert found == set(METRICS)
    for metric in ("", *METRICS):
        parse_config({"train": {"keep_best": metric}})


def test_rates_that_can_work():
    assert parse_config({"model": {"t5": {"dropout": 0}, "prompt_dropout": 0.99}}).model.prompt_dropout == 0.99


def test_whole_numbers_become_floats():
    assert isinstance(parse_config({"optimizer": {"clip_norm": 1}}).optimizer.clip_norm, float)


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().name = "other"  # pyright: ignore


def main(*arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "opendet_jax.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=folder)


def test_command_line_names_the_nearest_field(tmp_path):
    done = main("--config=configs/scenes_tiny.py", f"--workdir={tmp_path}", "--config.train.stps=3")
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1] == "error: a --config field does not exist: stps; did you mean steps?"
    assert "Traceback" not in done.stderr


def test_command_line_refuses_a_bad_value(tmp_path):
    done = main("--config=configs/scenes_tiny.py", f"--workdir={tmp_path}", "--config.model.width=33")
    assert done.returncode != 0
    assert "error: config.model.width = 33: must be a multiple of 32" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_data_there_is_a_recipe():
    done = main("--config=configs/swin_t.py")
    assert done.returncode != 0
    assert done.stderr.startswith("error: config.data.train.annotations is empty")
    assert "--config=configs/swin_t.py:scenes" in done.stderr
    full, scenes = shipped("swin_t"), parse_config(swin_t.get_config("scenes"))
    assert (scenes.model, scenes.optimizer, scenes.data.source) == (full.model, full.optimizer, "scenes")
    with pytest.raises(ConfigError, match=r"swin_t\.py:scene does not exist"):
        swin_t.get_config("scene")


def test_a_workdir_of_the_configs_name(tmp_path):
    config = Path("configs/scenes_tiny.py").resolve()
    done = main(f"--config={config}", "--mode=eval", folder=tmp_path)
    assert "error: no checkpoint in runs/scenes_tiny" in done.stderr


def test_eval_without_a_checkpoint_says_so(tmp_path):
    done = main("--config=configs/scenes_tiny.py", f"--workdir={tmp_path}", "--mode=eval")
    assert done.returncode != 0
    assert f"error: no checkpoint in {tmp_path}" in done.stderr
