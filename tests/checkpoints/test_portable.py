"""A whole model as config.json and model.safetensors: what comes back, what is refused, the one that comes along."""

import errno
import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

import opendet_jax
from configs import coco_json, trained
from opendet_jax.checkpoints.folder import CONFIG, MODEL, MODELS, load, read_shapes
from opendet_jax.checkpoints.restore import find_model, restore
from opendet_jax.checkpoints.same_config import CheckpointError
from opendet_jax.config_files import parse_config
from opendet_jax.weights.__main__ import main
from opendet_jax.weights.init import check_start


@pytest.fixture(scope="module")
def portable(run_written_before, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("models") / "portable"
    main(["export", str(run_written_before), "--to", "portable", "--out", str(out)])
    return out


def test_it_is_the_model_of_the_run(run_written_before, portable):
    run = run_written_before
    assert {path.name for path in portable.iterdir()} == {CONFIG, MODEL, "manifest.json"}
    assert (portable / MODEL).stat().st_mode == (portable / CONFIG).stat().st_mode  # others may read it
    config, params, step = restore(run)
    theirs, found, at = restore(portable)
    assert (theirs, at) == (config, step)
    jax.tree.map(np.testing.assert_array_equal, found, jax.device_get(params))
    assert restore(portable, step)[2] == step
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    first, second = (opendet_jax.load(folder).detect(image, min_score=0.0).to_json() for folder in (run, portable))
    assert first == second
    assert json.loads(first)["names"]


def test_numbers_of_two_bytes(run_written_before, tmp_path, capsys):
    run = run_written_before
    main(["export", str(run), "--to", "portable", "--out", str(tmp_path / "half"), "--dtype", "bfloat16"])
    assert "in bfloat16" in capsys.readouterr().out
    rounded = jax.tree.map(lambda x: np.asarray(x).astype(ml_dtypes.bfloat16).astype(np.float32), restore(run)[1])
    jax.tree.map(np.testing.assert_array_equal, restore(tmp_path / "half")[1], rounded)


def test_training_may_begin_with_it(portable):
    config = parse_config(coco_json.get_config(str(portable)))
    assert config.init.model == str(portable)
    shapes = jax.eval_shape(lambda: load(portable, "opendet").params)
    check_start(shapes, config)
    assert jax.tree.structure(read_shapes(portable, "opendet").params) == jax.tree.structure(shapes)
    assert parse_config(trained.get_config(str(portable))) == restore(portable)[0]


@pytest.mark.parametrize("damage", ["a byte", "cut", "no config", "config of nothing", "no checksums"])
def test_damage_is_found(portable, tmp_path, damage):
    folder = tmp_path / "model"
    shutil.copytree(portable, folder)
    content = bytearray((folder / MODEL).read_bytes())
    if damage == "a byte":
        content[-100] ^= 1
        (folder / MODEL).write_bytes(content)
    elif damage == "cut":
        (folder / MODEL).write_bytes(content[: len(content) // 2])
    elif damage == "no config":
        (folder / CONFIG).unlink()
    elif damage == "config of nothing":
        (folder / CONFIG).write_text("[]")
    else:
        (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=f"{folder}.*damaged"):
        opendet_jax.load(folder)


def refused(arguments: list[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    return str(stopped.value)


def test_what_cannot_be(run_written_before, portable, tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 7 in .*; its model is that of step"):
        restore(portable, 7)
    export = ["export", str(run_written_before), "--to"]
    assert "already holds weights" in refused([*export, "portable", "--out", str(portable)])
    said = refused([*export, "opendet", "--out", str(tmp_path / "x.safetensors"), "--dtype", "bfloat16"])
    assert said == "error: --dtype bfloat16: belongs to --to portable"
    assert not (tmp_path / "x.safetensors").exists()


def test_it_is_written_whole_or_not_at_all(run_written_before, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("opendet_jax.checkpoints.intact.write_manifest", fail)
    out = tmp_path / "model"
    said = refused(["export", str(run_written_before), "--to", "portable", "--out", str(out)])
    assert "No space left on device" in said
    assert not out.exists()


def test_a_tokenizer_that_is_not_in_it_is_named(run_written_before, tmp_path, monkeypatch, capsys):
    config, params, step = restore(run_written_before)
    elsewhere = replace(config, data=replace(config.data, tokenizer="tokenizers/t5"))
    monkeypatch.setattr("opendet_jax.weights.commands.restore", lambda _: (elsewhere, params, step))
    main(["export", str(run_written_before), "--to", "portable", "--out", str(tmp_path / "model")])
    assert "the tokenizer is not in it: tokenizers/t5 must be there" in capsys.readouterr().out


def test_a_name_means_the_model_that_comes_along_unless_a_folder_has_one(portable, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_model("scenes_tiny") == MODELS / "scenes_tiny"
    (tmp_path / "scenes_tiny" / "predict").mkdir(parents=True)  # results of its
    assert find_model("scenes_tiny") == MODELS / "scenes_tiny"
    (tmp_path / "scenes_tiny" / "checkpoints").mkdir()  # a run's that has none yet: not to be taken for another's
    assert find_model("scenes_tiny") == Path("scenes_tiny")
    (tmp_path / "scenes_tiny" / "checkpoints").rmdir()
    assert find_model("runs/scenes_tiny") == Path("runs/scenes_tiny")
    shutil.copytree(portable, tmp_path / "scenes_tiny", dirs_exist_ok=True)
    assert find_model("scenes_tiny") == Path("scenes_tiny")
    assert find_model("no_such_model") == Path("no_such_model")
    with pytest.raises(CheckpointError, match="no checkpoint in no_such_model"):
        opendet_jax.load("no_such_model")
