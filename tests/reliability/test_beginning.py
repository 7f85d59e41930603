"""The beginning of a run: what was given is looked at first, a failed try leaves nothing, a finished run says so."""

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import namedtuple
from dataclasses import asdict, replace
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from opendet_jax.checkpoints.folder import Converted, save
from opendet_jax.checkpoints.intact import steps
from opendet_jax.checkpoints.same_config import CheckpointError
from opendet_jax.config import Config, DatasetPaths, InitConfig
from opendet_jax.data.images import ImageError
from opendet_jax.data.text_embeddings import EmbeddingError
from opendet_jax.data.tokenizer import TokenizerError
from opendet_jax.errors import InputError, WeightsError
from opendet_jax.evaluate import loop
from opendet_jax.parallel.mesh import MeshError
from opendet_jax.parallel.processes import LOCK
from opendet_jax.train import run as run_module
from opendet_jax.train.run import Run
from opendet_jax.train.training_loop import train
from tests.reliability import toy
from tests.reliability.programs import (
    finish,
    logged,
    run,
    run_well,
    start,
    start_processes,
    tiny,
    wait_for,
)

CONFIG = tiny(steps=2)


def with_data(config: Config = CONFIG, **fields) -> Config:
    return replace(config, data=replace(config.data, **fields))


def starting_from(config: Config = CONFIG, **folders: Path) -> Config:
    return replace(config, init=InitConfig(**{name: str(folder) for name, folder in folders.items()}))


@pytest.fixture
def photographs(tmp_path) -> DatasetPaths:
    """Four pictures of a cat."""
    (tmp_path / "photos").mkdir()
    for i in range(4):
        Image.new("RGB", (40, 30)).save(tmp_path / "photos" / f"{i}.jpg")
    images = [{"id": i, "file_name": f"{i}.jpg", "width": 40, "height": 30} for i in range(4)]
    boxes = [{"id": i, "image_id": i, "category_id": 1, "bbox": [5, 5, 20, 20]} for i in range(4)]
    content = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "cat"}]}
    (tmp_path / "mine.json").write_text(json.dumps(content))
    return DatasetPaths(str(tmp_path / "mine.json"), str(tmp_path / "photos"))


@pytest.fixture
def weights(tmp_path) -> Path:
    """A whole (small) model with other numbers than a seed makes."""
    params = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.5, np.float32), toy.init_params(None, jax.random.key(0)))
    save(tmp_path / "weights", Converted("opendet", CONFIG.to_dict(), params), {"source": "a test"})
    return tmp_path / "weights"


@pytest.fixture
def nothing_is_compiled(monkeypatch):
    def compiled(*_):
        raise AssertionError("compiled before the input was looked at")

    monkeypatch.setattr(run_module, "initial_state", compiled)
    monkeypatch.setattr(run_module, "jit_step", compiled)


def no_room(_):
    return namedtuple("usage", "total used free")(10**9, 10**9, 1000)


def wrong_table(folder: Path) -> Path:
    np.save(folder / "table.npy", np.eye(3, dtype=np.float32))
    (folder / "table.json").write_text('["a", "b", "c"]')
    return folder / "table.npy"


@pytest.mark.usefixtures("nothing_is_compiled")
class TestBeforeAnythingIsCompiled:
    def refused(self, workdir: Path, config: Config, kind: type[InputError], message: str) -> None:
        with pytest.raises(kind, match=message):
            train(config, workdir)
        assert not (workdir / "checkpoints").exists()
        assert not (workdir / "training.lock").exists()

    def test_a_folder_without_the_pictures(self, tmp_path, photographs):
        (tmp_path / "empty").mkdir()
        wrong = replace(photographs, images=str(tmp_path / "empty"))
        for fields in ({"train": wrong}, {"train": photographs, "eval": wrong}):
            config = with_data(source="json", **fields)
            where = f"config.data.{[*fields][-1]}"
            self.refused(tmp_path / "run", config, ImageError, where.replace(".", r"\."))

    def test_one_of_several_sets_without_its_pictures(self, tmp_path, photographs):
        wrong = replace(photographs, images=str(tmp_path / "none"))
        config = with_data(source="json", train=photographs, mixture=(wrong,))
        self.refused(tmp_path / "run", config, ImageError, r"config\.data\.mixture\[0\]")

    def test_a_picture_to_evaluate_on_is_missing(self, tmp_path, photographs):
        (tmp_path / "photos" / "3.jpg").unlink()
        config = with_data(source="json", train=photographs, eval=photographs)
        self.refused(tmp_path / "run", config, ImageError, r"config\.data\.eval.* 1 of the 4 pictures")

    def test_names_that_cannot_be_learnt(self, tmp_path, photographs):
        config = with_data(source="json", train=photographs, max_unwritable=0.01, max_name_tokens=3)
        self.refused(tmp_path / "run", config, TokenizerError, r"(?s)training: 1 of 1 names.* 'cat' is cut off to 'ca'")

    def test_names_to_evaluate_on_that_cannot_be_found(self, tmp_path, photographs):
        long = json.loads(Path(photographs.annotations).read_text())
        long["categories"][0]["name"] = "a cat"
        (tmp_path / "long.json").write_text(json.dumps(long))
        other = replace(photographs, annotations=str(tmp_path / "long.json"))
        config = with_data(source="json", train=photographs, eval=other, max_unwritable=0.01)
        self.refused(tmp_path / "run", config, TokenizerError, r"evaluation on .*long\.json: 1 of 1 names")

    def test_nothing_to_evaluate_on(self, tmp_path, photographs):
        (tmp_path / "none.json").write_text('{"images": [], "annotations": [], "categories": []}')
        other = replace(photographs, annotations=str(tmp_path / "none.json"))
        config = with_data(source="json", train=photographs, eval=other)
        self.refused(tmp_path / "run", config, InputError, "there is no image to evaluate on")

    @pytest.mark.parametrize("metric", ["APr", "fixed_APu", "APl", "coco_APm"])
    def test_a_metric_that_the_evaluation_cannot_have(self, tmp_path, photographs, metric):
        config = with_data(tiny(steps=2, keep_best=metric), source="json", train=photographs, eval=photographs)
        message = rf"train\.keep_best = '{metric}': is not measured on .*mine\.json"
        self.refused(tmp_path / "run", config, InputError, message)

    def test_a_table_of_another_width_or_without_a_name(self, tmp_path, photographs):
        table = {"text_embeddings": "table", "text_table": str(wrong_table(tmp_path))}
        config = with_data(source="json", train=photographs, **table)
        self.refused(tmp_path / "run", config, EmbeddingError, "are 3 wide, model.text_width is 16")

    def test_a_batch_that_does_not_fit_the_mesh(self, tmp_path):
        config = replace(CONFIG, mesh=replace(CONFIG.mesh, data=len(jax.devices()) + 1))
        self.refused(tmp_path / "run", config, MeshError, "does not make")

    def test_a_tokenizer_that_is_not_there(self, tmp_path):
        config = with_data(tokenizer=str(tmp_path / "none"))
        self.refused(tmp_path / "run", config, TokenizerError, r"data\.tokenizer: cannot load")

    def test_no_room_for_a_checkpoint(self, tmp_path, monkeypatch):
        monkeypatch.setattr("shutil.disk_usage", no_room)
        message = r"run: has 0\.0 MiB free on its disk, a checkpoint needs 0\.1"
        self.refused(tmp_path / "run", CONFIG, CheckpointError, message)

    @pytest.mark.parametrize("name", ["model", "backbone", "t5"])
    def test_a_folder_to_start_from_that_holds_nothing(self, tmp_path, name):
        self.refused(tmp_path / "run", starting_from(**{name: tmp_path}), WeightsError, "holds no converted weights")

    def test_weights_to_start_from_of_another_kind(self, tmp_path, weights):
        self.refused(tmp_path / "run", starting_from(backbone=weights), WeightsError, "kind 'opendet', not 'swin'")

    def test_weights_to_start_from_of_other_sizes(self, tmp_path, weights):
        other = replace(starting_from(model=weights), model=replace(CONFIG.model, width=64))
        self.refused(tmp_path / "run", other, WeightsError, "width: the weights 32, the config 64")

    def test_parts_to_start_from_of_other_sizes(self, tmp_path):
        for kind, sizes, field in (
            ("swin", CONFIG.model.backbone, "window_size"),
            ("t5", CONFIG.model.t5, "num_heads"),
        ):
            config = {**asdict(sizes), "text_width": 16} if kind == "t5" else asdict(sizes)
            save(tmp_path / kind, Converted(kind, {**config, field: 3}, {"x": np.zeros(2)}), {"source": "a test"})
        for name, kind in (("backbone", "swin"), ("t5", "t5")):
            config = starting_from(**{name: tmp_path / kind})
            self.refused(tmp_path / "run", config, WeightsError, r"the weights 3, the config \d")

    def test_weights_to_start_from_that_do_not_fit(self, tmp_path):
        save(
            tmp_path / "w",
            Converted("opendet", CONFIG.to_dict(), {"backbone": {"kernel": np.zeros(3)}}),
            {"source": ""},
        )
        config = starting_from(model=tmp_path / "w")
        self.refused(tmp_path / "run", config, WeightsError, "does not fit the model at backbone/kernel")

    def test_damaged_weights_to_start_from(self, tmp_path, weights):
        files = [path for path in (weights / "checkpoints/0/params").rglob("*") if path.is_file()]
        largest = max(files, key=lambda path: path.stat().st_size)
        largest.write_bytes(largest.read_bytes()[:-1])
        self.refused(tmp_path / "run", starting_from(model=weights), WeightsError, "what it holds is damaged")


def test_a_checkpoint_of_another_config(tmp_path, monkeypatch):
    """Is seen before its data are read."""
    train(CONFIG, tmp_path)
    monkeypatch.setattr(run_module, "load_datasets", None)
    other = replace(CONFIG, model=replace(CONFIG.model, width=64), train=replace(CONFIG.train, steps=4))
    with pytest.raises(CheckpointError, match=r"model\.width: checkpoint 32, config 64"):
        train(other, tmp_path)


def test_a_failed_first_try_leaves_no_checkpoint(tmp_path, photographs, weights, monkeypatch, capsys):
    """Whatever ends it; the next try begins with the weights that it names."""
    config = with_data(starting_from(model=weights), source="json", train=photographs, eval=photographs)

    def unreadable(*_):
        raise ImageError("all pictures are damaged")

    with monkeypatch.context() as patch:
        patch.setattr(Run, "take_step", unreadable)
        with pytest.raises(ImageError, match="all pictures are damaged"):
            train(tiny(steps=2), tmp_path / "run")
    assert steps(tmp_path / "run" / "checkpoints") == []
    capsys.readouterr()
    train(config, tmp_path / "run")
    assert f"starting with model from {weights}" in capsys.readouterr().out
    fresh = tmp_path / "fresh"
    train(config, fresh)
    assert logged(tmp_path / "run") == logged(fresh)


def test_what_a_run_starts_from_cannot_be_changed_when_it_goes_on(tmp_path, weights):
    """An error, not a word overheard."""
    train(CONFIG, tmp_path / "run")
    longer = replace(CONFIG, train=replace(CONFIG.train, steps=4))
    with pytest.raises(
        CheckpointError, match=r"init\.model = .*weights' cannot act: the run goes on from .*/2, and began"
    ):
        train(starting_from(longer, model=weights), tmp_path / "run")
    finished = starting_from(CONFIG, model=weights)
    with pytest.raises(CheckpointError, match="cannot act"):
        train(finished, tmp_path / "run")
    assert steps(tmp_path / "run" / "checkpoints") == [2]


def test_what_a_run_started_from_may_be_named_again_or_not(tmp_path, weights, monkeypatch):
    """Also by another way to the folder, and when that is gone."""
    train(starting_from(model=weights), tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    shutil.rmtree(weights)
    for number, folder in ((4, Path("weights")), (6, weights)):
        train(starting_from(tiny(steps=number), model=folder), tmp_path / "run")
        assert steps(tmp_path / "run" / "checkpoints")[-1] == number
    train(tiny(steps=8), tmp_path / "run")
    other = starting_from(tiny(steps=10), model=tmp_path / "other")
    with pytest.raises(
        CheckpointError, match=r"and began with '.*weights'; another --workdir begins anew, --config\.init"
    ):
        train(other, tmp_path / "run")


@pytest.mark.parametrize(
    ("fields", "kind", "message"),
    [
        ({"eval": "empty"}, ImageError, r"config\.data\.eval.* 4 of the 4 pictures"),
        ({"max_unwritable": 0.01}, TokenizerError, r"evaluation on .*mine\.json: 1 of 1 names"),
    ],
)
def test_an_evaluation_looks_at_its_data_first(tmp_path, photographs, monkeypatch, fields, kind, message):
    """Before the text encoder is loaded and anything compiled."""
    (tmp_path / "empty").mkdir()
    long = Path(photographs.annotations).read_text().replace('"cat"', '"a cat"')
    Path(photographs.annotations).write_text(long)
    train(with_data(source="json", train=photographs, eval=photographs), tmp_path / "run")
    monkeypatch.setattr(loop, "load_naming", None)
    monkeypatch.setattr(loop, "Inference", None)
    wrong = replace(photographs, images=str(tmp_path / "empty")) if "eval" in fields else photographs
    config = with_data(source="json", train=photographs, eval=wrong, **{k: v for k, v in fields.items() if k != "eval"})
    with pytest.raises(kind, match=message):
        loop.evaluate_checkpoint(config, tmp_path / "run")


def test_a_finished_run_says_so_and_does_nothing(tmp_path, monkeypatch, capsys):
    train(CONFIG, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "load_datasets", None)
        train(CONFIG, tmp_path)
        train(tiny(steps=1), tmp_path)
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(
        f"finished: {tmp_path} has 2 of 2 steps, evaluated in {tmp_path}/eval; --config.train.steps=4"
    )
    assert second.startswith(f"finished: {tmp_path} has 2 of 1 steps")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before
    train(tiny(steps=4), tmp_path)
    assert "continuing from step 2" in capsys.readouterr().out


def test_a_run_that_was_not_evaluated_is_not_finished(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "evaluate", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(CONFIG, tmp_path)
    train(CONFIG, tmp_path)
    [row] = [json.loads(line) for line in (tmp_path / "evaluations.jsonl").read_text().splitlines()]
    assert row["step"] == 2


def test_a_run_that_goes_on_keeps_the_names_it_was_begun_with(tmp_path, caplog):
    """A version that did not look at them began it: said, no error."""
    train(CONFIG, tmp_path)
    train(with_data(tiny(steps=4), max_unwritable=0.01), tmp_path)
    assert "cannot be learnt: with data.tokenizer = 'byt5' and data.max_name_tokens = 4" in caplog.text


@pytest.mark.slow  # a minute of imports
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("data.batch_size=0",), "config.data.batch_size = 0: must be at least 1"),
        (("--mode=replay", "train.replay=none.npz"), "config.train.replay = 'none.npz': must be the file of a batch"),
        (("--mode=replay",), "config.train.replay = '': must be the file of a batch"),
        (("--mode=predict",), "config.predict.inputs = '': must be a path or a glob of images"),
        (("data.source=json",), "config.data.train.annotations is empty"),
        (("data.source=json", "data.train.annotations=no.json"), "config.data.train.annotations = 'no.json': must be"),
        (("data.source=json", "data.train.annotations=README.md"), "config.data.train.images = '': must be the folder"),
        (("--mode=eval", "data.source=json", "data.eval.annotations=no"), "config.data.eval.annotations = 'no'"),
        (("model.t5.dropout=1.5",), "config.model.t5.dropout = 1.5: must be a share of at least 0 and below 1"),
        (("train.keep_best=None",), "config.train.keep_best = 'None': is no metric of an evaluation"),
    ],
)
def test_a_field_is_looked_at_before_what_is_slow_to_load(tmp_path, overrides, message):
    began = time.monotonic()
    done = run(tmp_path / "run", *overrides, module="opendet_jax.main")
    assert (done.status, f"error: {message}" in done.err) == (1, True), done.err
    assert time.monotonic() - began < 10
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_trainings_in_one_workdir(tmp_path):
    """The second is told of the first, which goes on undisturbed; so are the processes of a run of several."""
    first = start(tmp_path, "train.steps=1000", "train.checkpoint_every=0", TOY_SLEEP=0.05)
    wait_for(lambda: (tmp_path / "metrics.jsonl").exists() and len(logged(tmp_path)) >= 3, first)
    message = f"error: {tmp_path}: process {first.pid} on {socket.gethostname()} (begun "
    for done in (run(tmp_path), *map(finish, start_processes(tmp_path, 2))):
        assert (done.status, message in done.err) == (1, True), done.err
        assert "trains here" in done.err
        assert "name another --workdir" in done.err
    first.send_signal(signal.SIGTERM)
    done = finish(first)
    assert "which is saved" in done.out, done.err
    assert not (tmp_path / LOCK).exists()


@pytest.mark.slow
def test_after_a_kill_the_same_command_goes_on(tmp_path):
    first = start(tmp_path, "train.steps=1000", "train.checkpoint_every=1", TOY_SLEEP=0.05)
    wait_for(lambda: bool(steps(tmp_path / "checkpoints")), first)
    first.kill()
    finish(first)
    assert (tmp_path / LOCK).exists()
    last = steps(tmp_path / "checkpoints")[-1]
    assert f"continuing from step {last}" in run_well(tmp_path, f"train.steps={last + 1}")


def test_a_training_that_was_taken_for_dead_saves_elsewhere(tmp_path, monkeypatch):
    """Another has the workdir by then, and keeps it."""
    take_step = Run.take_step

    def taken(run):
        if run.step == 1:
            (run.workdir / LOCK).write_text('{"process": 1, "host": "other", "since": "then", "token": "x"}')
        return take_step(run)

    monkeypatch.setattr(Run, "take_step", taken)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(
        InputError, match=r"process 1 on other \(begun then\) has taken it over.*\n.*step 2 is in (\S+)"
    ):
        train(CONFIG, tmp_path / "run")
    assert steps(tmp_path / "run" / "checkpoints") == []
    assert len(list(tmp_path.glob("opendet_jax_*/checkpoints/2"))) == 1
    assert "other" in (tmp_path / "run" / LOCK).read_text()


@pytest.mark.slow
def test_the_program_says_that_it_is_finished(tmp_path):
    run_well(tmp_path, "train.steps=1")
    assert run_well(tmp_path, "train.steps=1").splitlines()[1].startswith("finished: ")


def test_a_run_on_several_data_sets_goes_on(tmp_path, photographs):
    mixture = (photographs, replace(photographs, weight=2.0))
    config = with_data(tiny(steps=2), source="json", train=photographs, eval=photographs, mixture=mixture)
    train(config, tmp_path / "run")
    more = replace(config, train=replace(config.train, steps=4))
    train(more, tmp_path / "run")
    train(more, tmp_path / "whole")
    assert logged(tmp_path / "run") == logged(tmp_path / "whole")
    for others in ((), mixture[:1]):
        with pytest.raises(CheckpointError, match=r"mixture\.1\.weight: checkpoint 2\.0, config '\(absent\)'"):
            train(with_data(replace(more, train=replace(more.train, steps=6)), mixture=others), tmp_path / "run")


def test_an_evaluation_that_was_cut_off_is_made_up_for(tmp_path, monkeypatch):
    """Else the best checkpoint could go for want of it."""
    config = tiny(steps=6, eval_every=2, checkpoint_every=0)
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "evaluate", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(config, tmp_path)
    assert steps(tmp_path / "checkpoints") == [2]
    train(config, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "evaluations.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6]


def test_a_run_reads_its_config_without_devices(tmp_path):
    """A config file does, before several processes are one; and what it gives is of no other machine."""
    train(replace(CONFIG, mesh=replace(CONFIG.mesh, data=1)), tmp_path)
    script = f"""
from jax._src import xla_bridge
from configs import coco_json, trained
for config in (coco_json.get_config({str(tmp_path)!r}), trained.get_config({str(tmp_path)!r})):
    assert config.mesh.data == -1, config.mesh
assert not xla_bridge.backends_are_initialized()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
