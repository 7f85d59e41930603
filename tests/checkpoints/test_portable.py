"""A whole model as config.json and model.safetensors: what comes back, what is refused, the one that comes along."""

import errno
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import tokenizers

import opendet_jax
from configs import coco_json, trained
from opendet_jax.checkpoints.folder import CONFIG, MODEL, MODELS, load, read_shapes
from opendet_jax.checkpoints.restore import find_model, restore
from opendet_jax.checkpoints.same_config import CheckpointError
from opendet_jax.config_files import parse_config
from opendet_jax.data.tokenizer import load_tokenizer
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


@pytest.fixture
def with_tokenizer(run_written_before, monkeypatch) -> Callable[[Path | str, int], None]:
    """The run as if it had been trained with a tokenizer."""

    def use(tokenizer: Path | str, vocab_size: int) -> None:
        config, params, step = restore(run_written_before)
        model = replace(config.model, t5=replace(config.model.t5, vocab_size=vocab_size))
        config = replace(config, model=model, data=replace(config.data, tokenizer=str(tokenizer)))
        monkeypatch.setattr("opendet_jax.weights.commands.restore", lambda _: (config, params, step))

    return use


@pytest.fixture
def small_tokenizer(tmp_path) -> Path:
    """T5's kind with a word a token, and a file that is no part of it."""
    words = {word: place for place, word in enumerate(["<pad>", "</s>", "<unk>", "red", "circle", "striped"])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.add_special_tokens(["<pad>", "</s>", "<unk>"])
    folder = tmp_path / "small"
    folder.mkdir()
    inner.save(str(folder / "tokenizer.json"))
    described = {"tokenizer_class": "T5Tokenizer", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    (folder / "notes.txt").write_text("mine")
    return folder


def test_its_tokenizer_goes_with_it(run_written_before, with_tokenizer, small_tokenizer, tmp_path, monkeypatch):
    with_tokenizer(small_tokenizer, 384)
    content = {path.name: path.read_bytes() for path in small_tokenizer.glob("tok*")}
    main(["export", str(run_written_before), "--to", "portable", "--out", str(tmp_path / "model")])
    shutil.rmtree(small_tokenizer)
    moved = (tmp_path / "model").rename(tmp_path / "moved")
    assert {path.name: path.read_bytes() for path in (moved / "tokenizer").iterdir()} == content
    assert json.loads((moved / CONFIG).read_text())["data"]["tokenizer"] == "tokenizer"
    sums = json.loads((moved / "manifest.json").read_text())
    assert sums.keys() == {CONFIG, MODEL, "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"}

    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    config = opendet_jax.load("moved").config
    assert config.data.tokenizer == str(moved / "tokenizer")
    assert parse_config(trained.get_config("moved")) == config
    assert parse_config(coco_json.get_config("moved")).data.tokenizer == config.data.tokenizer
    tokenizer = load_tokenizer(config.data.tokenizer, 384)
    assert (tokenizer.encode("striped red circle"), tokenizer.decode([3, 4, 1])) == ([5, 3, 4], "red circle")

    main(["export", "moved", "--to", "portable", "--out", "again"])
    for name in sums:
        assert (tmp_path / "again" / name).read_bytes() == (moved / name).read_bytes()
    (moved / "tokenizer" / "tokenizer.json").write_bytes(content["tokenizer.json"] + b" ")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: is damaged"):
        opendet_jax.load("moved")
    shutil.rmtree(moved / "tokenizer")
    with pytest.raises(CheckpointError, match=r"tokenizer/tokenizer\.json is missing"):
        opendet_jax.load("moved")


def test_the_tokenizer_of_t5_goes_with_it(run_written_before, with_tokenizer, data_folder, tmp_path):
    there = data_folder / "tokenizers" / "t5"
    with_tokenizer(there, 32128)
    main(["export", str(run_written_before), "--to", "portable", "--out", str(tmp_path / "model")])
    own = load_tokenizer(restore(tmp_path / "model")[0].data.tokenizer, 32128)
    theirs = load_tokenizer(str(there), 32128)
    for name in ("zebra-striped café table", "bus_(vehicle)", "don 't"):
        assert own.encode(name) == theirs.encode(name)
        assert own.decode(own.encode(name)) == theirs.decode(theirs.encode(name))
    files = {path.name for path in (tmp_path / "model" / "tokenizer").iterdir()}
    assert files == {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "spiece.model"}


def test_a_tokenizer_that_cannot_be_had_is_named(run_written_before, with_tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with_tokenizer("tokenizers/t5", 384)
    main(["export", str(run_written_before), "--to", "portable", "--out", str(tmp_path / "model")])
    said = capsys.readouterr().out
    assert (
        "the tokenizer is not in it, and must be there where it is loaded: hf://tokenizers/t5: HF_HUB_OFFLINE" in said
    )
    assert json.loads((tmp_path / "model" / CONFIG).read_text())["data"]["tokenizer"] == "tokenizers/t5"
    (tmp_path / "empty").mkdir()
    with_tokenizer(tmp_path / "empty", 384)
    main(["export", str(run_written_before), "--to", "portable", "--out", str(tmp_path / "other")])
    assert "where it is loaded: data.tokenizer = '" in capsys.readouterr().out


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
