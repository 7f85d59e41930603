"""The program as a user runs it: the embedded default, shrunk, for a few steps; train, resume, evaluate, predict."""

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import opendet_jax
from opendet_jax.checkpoints.restore import restore
from opendet_jax.checkpoints.same_config import CheckpointError
from opendet_jax.config import Config
from opendet_jax.config_files import parse_config
from opendet_jax.data.formats.json_source import AnnotationError
from opendet_jax.evaluate.loop import evaluate_checkpoint
from opendet_jax.predict.predictions import predict_from_config
from opendet_jax.train import run
from opendet_jax.train.step import jit_step
from opendet_jax.train.training_loop import train
from tests.golden.parameters import shipped
from tests.model.conftest import SHALLOW

STEPS = 4


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    scenes = shipped("scenes_tiny")
    model = replace(SHALLOW, t5=replace(SHALLOW.t5, vocab_size=scenes.model.t5.vocab_size))
    folder = str(tmp_path_factory.mktemp("scenes"))
    data = replace(scenes.data, scenes_dir=folder, scenes_train=12, scenes_eval=5, batch_size=3)
    data = replace(data, scenes_size=64, buckets=((64, 64),), train_short_sides=(64,), eval_short_side=64)
    return replace(
        scenes,
        model=model,
        data=data,
        train=replace(scenes.train, steps=STEPS, log_every=1, checkpoint_every=2),
        eval=replace(scenes.eval, batch_size=2, max_detections=5, max_new_tokens=4, pictures=2),
    )


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """Every run here has the same step. That it is the same in other processes, and with other `train.steps`:
    tests/reliability/test_resume.py."""
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "jit_step", lambda *given: made.setdefault("step", jit_step(*given)))
        yield


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("run")
    train(config, workdir)
    return workdir


def metrics(workdir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_the_makefile_predicts_on_pictures_that_are_there(trained, config):
    """`make run` names the drawn scenes by a glob."""
    makefile = Path(__file__).parents[2] / "Makefile"
    [pattern] = re.findall(r"predict\.inputs='\$\(RUN\)/(\S+)'", makefile.read_text())
    found = {path.name for path in Path(config.data.scenes_dir).glob(pattern)}
    assert found == {"000000.jpg"}  # of five


@pytest.mark.parametrize("stopped", [True, False])
def test_the_makefile_predicts_only_when_training_has_ended(tmp_path, stopped):
    """A stopped training's own sentence is the last."""
    python = tmp_path / "python"
    evaluated = tmp_path / "run/eval/scenes/metrics.json"
    ends = 'echo "SIGTERM: stopped after step 3"' if stopped else f"mkdir -p {evaluated.parent}; touch {evaluated}"
    python.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/called\n{ends}\n')
    python.chmod(0o755)
    # Below another make, this one would name the folders it enters and leaves.
    command = ["make", "--no-print-directory", "-o", ".venv/run", "run", f"BIN={tmp_path}", f"RUN={tmp_path}/run"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=60)
    calls = (tmp_path / "called").read_text().splitlines()
    assert ["--mode=train" in calls[0], *("--mode=predict" in call for call in calls[1:])] == [True] * (2 - stopped)
    if stopped:
        assert done.returncode != 0
        assert done.stdout.splitlines()[-1] == "SIGTERM: stopped after step 3"
        assert "ls:" not in done.stderr


def width_of(picture: Path) -> int:
    with Image.open(picture) as image:
        return image.width


def test_training_leaves_what_was_promised(trained, config):
    rows = metrics(trained)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    terms = {"total", "naming", "text_denoising", "l1/layer_1", "giou/encoder", "joint/denoising_1", "focal/layer_2"}
    for row in rows:
        assert terms | {"alignment/layer_1", "distillation/denoising_2"} <= set(row)
        assert all(math.isfinite(value) for value in row.values())
    assert any(len(repr(value)) > 12 for value in rows[0].values()), "full precision"
    assert parse_config(json.loads((trained / "config.json").read_text())) == config
    assert {path.name for path in (trained / "checkpoints").iterdir() if path.name.isdigit()} == {"2", "4"}
    assert list((trained / "tensorboard").glob("events*"))
    assert width_of(trained / "curves.png") > 500


def test_evaluation_leaves_what_was_promised(trained, config):
    folder = trained / "eval" / "scenes"
    scores = json.loads((folder / "metrics.json").read_text())
    assert (scores["images"], scores["step"], scores["name_mapping"]) == (5, STEPS, "exact")
    assert {"AP", "AP50", "APr", "APc", "APf", "APu", "agnostic_AP", "fixed_AP", "naming_accuracy"} <= set(scores)
    predictions = json.loads((folder / "predictions.json").read_text())
    assert len(predictions) == scores["detections"]
    for entry in predictions:
        assert {"image_id", "category_id", "bbox", "score", "names", "name_scores"} == set(entry)
        assert len(entry["names"]) == len(entry["name_scores"]) == config.eval.num_beams
    assert width_of(folder / "pictures.png") > 500


def test_resuming_gives_the_same_bits(trained, config, tmp_path, capsys):
    train(replace(config, train=replace(config.train, steps=2)), tmp_path)
    train(config, tmp_path)
    assert "continuing from step 2" in capsys.readouterr().out
    assert metrics(tmp_path) == metrics(trained)
    _, want, _ = restore(trained)
    _, got, step = restore(tmp_path)
    assert step == STEPS
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_eval_restores_newest_and_named_checkpoints(trained, config):
    path = trained / "eval" / "scenes" / "metrics.json"
    after_training = path.read_text()
    evaluate_checkpoint(replace(config, eval=replace(config.eval, checkpoint=2)), trained)
    assert json.loads(path.read_text())["step"] == 2
    evaluate_checkpoint(config, trained)
    assert path.read_text() == after_training


def test_a_checkpoint_of_another_config_is_refused(trained, config):
    other = replace(config, model=replace(config.model, encoder_layers=2))
    for mode in (train, evaluate_checkpoint):
        with pytest.raises(CheckpointError, match=r"model\.encoder_layers: checkpoint 1, config 2"):
            mode(other, trained)


def test_python_interface(trained, config):
    detector = opendet_jax.load(trained)
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    one = detector.detect(pixels, max_detections=7, min_score=0.0)
    assert 1 <= len(one) <= 7
    assert (np.diff(one.scores) <= 0).all()
    assert (one.boxes >= 0).all()
    assert (one.boxes <= np.array([70, 50, 70, 50])).all()
    assert all(isinstance(name, str) for name in one.names)
    both = detector.detect([pixels, Image.fromarray(pixels)], max_detections=7, min_score=0.0)
    for found in both:
        np.testing.assert_array_equal(found.boxes, one.boxes)
        assert found.names == one.names
    assert detector.detect(pixels, min_score=1.0).names == []


def run_main(*arguments: str, config: str = "--config=configs/scenes_tiny.py") -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "opendet_jax.main", *([config] if config else []), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_predict_from_the_command_line(trained, tmp_path):
    Image.new("L", (40, 30), 128).save(tmp_path / "grey.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n")
    out = tmp_path / "out"
    done = run_main(
        f"--workdir={trained}",
        "--mode=predict",
        f"--config.predict.inputs={tmp_path}/*.png",
        f"--config.predict.output={out}",
        "--config.predict.min_score=0.0",
        "--config.eval.num_beams=2",
        config="",  # the run's own
    )
    assert done.returncode == 0, done.stderr
    assert "skipped:" in done.stderr
    assert "broken.png" in done.stderr
    [entry] = json.loads((out / "predictions.json").read_text())
    assert entry["file"].endswith("grey.png")
    assert len(entry["boxes"]) == len(entry["names"]) == len(entry["scores"]) > 0
    assert {len(others) for others in entry["alternatives"]} == {1}, "fields of its config are set as ever"
    assert width_of(out / "grey.png") >= 480


def test_prediction_by_another_config_is_refused(trained, config, tmp_path):
    Image.new("L", (40, 30), 128).save(tmp_path / "grey.png")
    predict = replace(config.predict, inputs=str(tmp_path / "grey.png"), output=str(tmp_path / "out"))
    other = replace(config, predict=predict, model=replace(config.model, num_points=3))
    with pytest.raises(CheckpointError, match=r"model\.num_points: checkpoint 2, config 3"):
        predict_from_config(other, trained)
    assert not (tmp_path / "out").exists()


def test_bad_input_is_one_line(trained, tmp_path):
    (tmp_path / "broken.json").write_text('{"images": [')
    cases = {
        f"{tmp_path}/broken.json: is not json": (
            "--config.data.source=json",
            f"--config.data.train.annotations={tmp_path}/broken.json",
            f"--config.data.train.images={tmp_path}",
        ),
        "config.data.train.images = ''": (
            "--config.data.source=json",
            f"--config.data.train.annotations={tmp_path}/broken.json",
        ),
        "data.tokenizer: cannot load '/nowhere'": (
            "--config.data.tokenizer=/nowhere",
            "--config.data.scenes_train=3",
            "--config.data.scenes_eval=1",
        ),
    }
    for message, arguments in cases.items():
        done = run_main(f"--workdir={tmp_path}/new", *arguments)
        assert done.returncode != 0
        assert f"error: {message}" in done.stderr
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "new" / "checkpoints").exists()


def test_no_objects_to_train_on(config, tmp_path):
    empty = {"images": [], "annotations": [], "categories": []}
    (tmp_path / "empty.json").write_text(json.dumps(empty))
    paths = {"annotations": str(tmp_path / "empty.json"), "images": str(tmp_path)}
    data = parse_config({"data": {"source": "json", "train": paths, "eval": paths}}).data
    data = replace(config.data, source="json", train=data.train, eval=data.eval)
    with pytest.raises(AnnotationError, match="no image has an object to train on"):
        train(replace(config, data=data), tmp_path / "run")
