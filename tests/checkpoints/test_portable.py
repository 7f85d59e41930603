"""A whole model as config.json and model.safetensors: what comes back, what is refused, the one that comes along."""

import json
import shutil
import tarfile
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

import opendet_jax
from configs import coco_json, trained
from opendet_jax.checkpoints.folder import CONFIG, MODEL, MODELS, find_model, load, read_shapes
from opendet_jax.checkpoints.restore import restore
from opendet_jax.checkpoints.same_config import CheckpointError
from opendet_jax.config_files import parse_config
from opendet_jax.errors import WeightsError
from opendet_jax.weights.__main__ import main
from opendet_jax.weights.init import check_start

ARCHIVE = Path(__file__).with_name("written_before.tar.xz")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("before")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder / "run"


@pytest.fixture(scope="module")
def portable(run, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("models") / "portable"
    main(["export", str(run), "--to", "portable", "--out", str(out)])
    return out


def test_it_is_the_model_of_the_run(run, portable):
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


def test_numbers_of_two_bytes(run, tmp_path, capsys):
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


def test_what_cannot_be(run, portable, tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 7 in .*; its model is that of step"):
        restore(portable, 7)
    with pytest.raises(WeightsError, match="already holds weights"):
        main_as_called(["export", str(run), "--to", "portable", "--out", str(portable)])
    with pytest.raises(SystemExit, match="--dtype bfloat16: belongs to --to portable"):
        main(["export", str(run), "--to", "opendet", "--out", str(tmp_path / "x.safetensors"), "--dtype", "bfloat16"])
    assert not (tmp_path / "x.safetensors").exists()


def main_as_called(arguments: list[str]) -> None:
    """The command, with the error that it would print."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    raise WeightsError(str(stopped.value))


def test_a_name_means_the_model_that_comes_along_unless_a_folder_has_one(portable, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_model("scenes_tiny") == MODELS / "scenes_tiny"
    (tmp_path / "scenes_tiny" / "predict").mkdir(parents=True)  # results of its
    assert find_model("scenes_tiny") == MODELS / "scenes_tiny"
    assert find_model("runs/scenes_tiny") == Path("runs/scenes_tiny")
    shutil.copytree(portable, tmp_path / "scenes_tiny", dirs_exist_ok=True)
    assert find_model("scenes_tiny") == Path("scenes_tiny")
    assert find_model("no_such_model") == Path("no_such_model")
    with pytest.raises(CheckpointError, match="no checkpoint in no_such_model"):
        opendet_jax.load("no_such_model")
