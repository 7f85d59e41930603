"""A loss or gradient that is not finite: refused before the update, reported, saved for replay; or skipped, counted."""

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Literal
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from opendet_jax.batch import Batch, Images, Objects
from opendet_jax.checkpoints.intact import steps
from opendet_jax.checkpoints.same_config import CheckpointError
from opendet_jax.config import Config, OptimizerConfig, TrainConfig
from opendet_jax.data.datasets import load_datasets
from opendet_jax.data.pipeline import training_stream
from opendet_jax.data.text_embeddings import make_embedder
from opendet_jax.data.tokenizer import load_tokenizer
from opendet_jax.model.opendet import OpenDet
from opendet_jax.train import replay as replay_module
from opendet_jax.train import step as step_module
from opendet_jax.train.finite import REFUSED, NonFiniteError
from opendet_jax.train.metrics import is_evaluated
from opendet_jax.train.optimizer import TrainState, fresh_state, make_optimizer
from opendet_jax.train.replay import ReplayError, load_batch, replay
from opendet_jax.train.training_loop import train
from tests.reliability.programs import (
    assert_same_checkpoint,
    finish,
    logged,
    run,
    run_well,
    start_processes,
    tiny,
)

CONFIG = tiny(steps=6)


def toy_state(gradients: list[float], policy: Literal["stop", "skip"]) -> tuple[TrainState, list[int]]:
    """The state after a step for each gradient, and how many were refused after each: parameters at two rates, one of
    them frozen at first, and a moving average."""
    head = {"name_generator": {"t5": {"lm_head": {"kernel": jnp.ones((2, 3))}}}}
    params = {"decoder": {"kernel": jnp.linspace(-1, 1, 3)}, "backbone": {"scale": jnp.ones(2)}} | head
    config = Config(
        optimizer=OptimizerConfig(freeze_head_steps=1, warmup_steps=3),
        train=TrainConfig(ema=0.9, non_finite=policy),
    )
    no_objects = Objects(
        boxes=np.zeros((1, 1, 4), np.float32),
        valid=np.zeros((1, 1), bool),
        texts=np.zeros((1, 1, 8), np.float32),
        tokens=np.zeros((1, 1, 2), np.int32),
    )
    optimizer = make_optimizer(config.optimizer, config.ablation)
    state, refused = fresh_state(params, optimizer, config), []

    def gradients_of(params, batch, step):
        grads = jax.tree.map(lambda x: x * jnp.array(gradients)[batch.images.pixels.max()], params)
        return {"total": jnp.float32(1), "gradient_norm": optax.tree.norm(grads)}, grads

    with patch.object(step_module, "step_gradients", lambda *_: gradients_of):
        step = jax.jit(step_module.make_train_step(OpenDet(config.model), optimizer, config))
        for number in range(len(gradients)):
            images = Images(np.full((1, 32, 32, 3), number, np.uint8), np.ones((1, 32, 32), bool))
            state, terms = step(state, Batch(images, no_objects))
            refused.append(int(terms[REFUSED]))
    return state, refused


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_step_leaves_the_state(bad):
    """Parameters, moments, counters of the schedules and average, to the last bit; only "skip" counts the step."""
    good, _ = toy_state([0.5, 2.0], "stop")
    for policy, step in (("stop", 2), ("skip", 3)):
        state, refused = toy_state([0.5, 2.0, bad], policy)
        assert refused == [0, 0, 1]
        want = replace(good, step=jnp.int32(step), refused=jnp.int32(1))
        jax.tree.map(np.testing.assert_array_equal, state, want)


def test_the_very_first_step_may_be_bad():
    state, refused = toy_state([np.nan], "stop")
    assert refused == [1]
    jax.tree.map(np.testing.assert_array_equal, state, replace(toy_state([], "stop")[0], refused=jnp.int32(1)))


def test_after_a_stop_no_step_is_taken():
    """Steps that were sent before the host knows leave the state alone too, finite or not; "skip" goes on."""
    state, refused = toy_state([0.5, np.nan, 2.0], "stop")
    assert refused == [0, 1, 2]
    jax.tree.map(np.testing.assert_array_equal, state, replace(toy_state([0.5], "stop")[0], refused=jnp.int32(2)))
    state, refused = toy_state([0.5, np.nan, 2.0], "skip")
    assert refused == [0, 1, 1]
    good, _ = toy_state([0.5, 2.0], "skip")
    jax.tree.map(np.testing.assert_array_equal, state.opt_state, good.opt_state)
    jax.tree.map(np.testing.assert_array_equal, state.params, good.params)


@pytest.fixture
def stopped(tmp_path, monkeypatch) -> tuple[Path, str]:
    """(workdir, message) of a run whose fifth batch is bad."""
    monkeypatch.setenv("TOY_POISON", "5")
    with pytest.raises(NonFiniteError) as error:
        train(CONFIG, tmp_path / "run")
    return tmp_path / "run", str(error.value)


def test_stops_before_the_update(stopped, tmp_path, monkeypatch):
    """With step, terms and images in the message; the steps before it are saved as if nothing had happened."""
    workdir, message = stopped
    images = load_batch(workdir / "non_finite" / "step_5.npz").image_ids.tolist()
    terms = "gradient_norm, l1/layer_1, total"
    assert message.startswith(f"step 5: {terms} not finite; images {images}\n")
    assert "--config.train.non_finite=skip goes on without it" in message
    assert steps(workdir / "checkpoints") == [2, 4]
    assert [row["step"] for row in logged(workdir)] == [1, 2, 3, 4]
    monkeypatch.setenv("TOY_POISON", "0")
    train(replace(CONFIG, train=replace(CONFIG.train, steps=4)), tmp_path / "good")
    assert_same_checkpoint(workdir, tmp_path / "good", 4, CONFIG)


def test_stops_at_a_step_between_checkpoints_and_log_lines(tmp_path, monkeypatch):
    """The host sees it although it asks for nothing; the step before it gets a checkpoint of its own."""
    monkeypatch.setenv("TOY_POISON", "4")
    rare = replace(CONFIG, train=replace(CONFIG.train, steps=50, log_every=50, checkpoint_every=50))
    with pytest.raises(NonFiniteError, match="step 4: "):
        train(rare, tmp_path)
    assert steps(tmp_path / "checkpoints") == [3]
    train(replace(rare, train=replace(rare.train, steps=6, log_every=1, non_finite="skip")), tmp_path)
    assert [row["skipped"] for row in logged(tmp_path)] == [1, 1, 1], "the one that stopped it is not counted twice"


def test_a_batch_that_cannot_be_written_beside_the_run_is_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv("TOY_POISON", "5")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "non_finite").write_text("in the place of the folder")
    with pytest.raises(NonFiniteError, match=r"Its batch is (\S+/step_5\.npz): --mode=replay") as error:
        train(CONFIG, tmp_path / "run")
    (place,) = tmp_path.glob("opendet_jax_*/step_5.npz")
    assert str(place) in str(error.value)
    assert load_batch(place).step == 4
    assert steps(tmp_path / "run" / "checkpoints") == [2, 4]


def test_a_batch_that_can_be_written_nowhere(tmp_path, monkeypatch):
    """The message is still that of the step, and the state is saved."""
    monkeypatch.setenv("TOY_POISON", "5")

    def full(*_) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(replay_module, "_write", full)
    with pytest.raises(
        NonFiniteError, match=r"^step 5: .*\nIts batch could not be saved: No space left on device\nThe steps before"
    ):
        train(CONFIG, tmp_path)
    assert steps(tmp_path / "checkpoints") == [2, 4]


def test_the_last_step_too(tmp_path, monkeypatch):
    monkeypatch.setenv("TOY_POISON", "6")
    with pytest.raises(NonFiniteError, match="step 6: "):
        train(CONFIG, tmp_path)
    assert steps(tmp_path / "checkpoints") == [2, 4, 5]
    assert (tmp_path / "curves.png").exists(), "up to the step before it"
    assert not is_evaluated(tmp_path, 6)


def test_replay_shows_where_it_began(stopped, capsys):
    workdir, _ = stopped
    again = replace(CONFIG, train=replace(CONFIG.train, replay=str(workdir / "non_finite" / "step_5.npz")))
    replay(again, workdir)
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("step 5, from the checkpoint of step 4; images [") for line in lines)
    assert "parameters: finite" in lines
    assert any(line.startswith("batch: 24 of ") for line in lines), "the boxes"
    assert any(line.split() == ["l1/layer_1", "nan", "←", "not", "finite"] for line in lines)
    assert any(line.split()[0] == "naming" and "not finite" not in line for line in lines if line)
    assert any(line.split() == ["name_generator", "finite"] for line in lines), "its loss does not know the boxes"
    assert any(line.startswith("first: decoder, in ") for line in lines)


def batch_of_step(workdir: Path, step: int) -> Batch:
    """What training draws for a step, from the pictures of a run."""
    mixture, _ = load_datasets(CONFIG, workdir)
    tokenizer = load_tokenizer(CONFIG.data.tokenizer, CONFIG.model.t5.vocab_size)
    embedder = make_embedder(CONFIG.data, CONFIG.model.text_width)
    batches = iter(training_stream(mixture, CONFIG.data, tokenizer, embedder, CONFIG.train.seed))
    return next(islice(batches, step - 1, None)).batch


def test_replay_is_the_same_step(tmp_path, monkeypatch, capsys):
    """Of a batch that turns out well: the very losses that training logs for it."""
    monkeypatch.setenv("TOY_POISON", "5")
    with pytest.raises(NonFiniteError):
        train(CONFIG, tmp_path / "bad")
    path = tmp_path / "bad" / "non_finite" / "step_5.npz"
    monkeypatch.setenv("TOY_POISON", "0")
    train(CONFIG, tmp_path / "good")
    arrays = dict(np.load(path))
    want, good = logged(tmp_path / "good")[4], batch_of_step(tmp_path / "good", 5)
    np.testing.assert_array_equal(good.images.pixels, arrays["images.pixels"])
    np.savez(path, **(arrays | {"objects.boxes": good.objects.boxes}))
    replay(replace(CONFIG, train=replace(CONFIG.train, replay=str(path))), tmp_path / "bad")
    printed = dict(line.split()[:2] for line in capsys.readouterr().out.splitlines() if line.startswith("  "))
    for name in ("total", "l1/layer_1", "naming", "gradient_norm"):
        assert float(printed[name]) == pytest.approx(want[name], rel=1e-6)


def test_replay_says_what_it_lacks(stopped, tmp_path):
    workdir, _ = stopped
    file = workdir / "non_finite" / "step_5.npz"
    with pytest.raises(ReplayError, match=r"train\.replay is empty"):
        replay(CONFIG, workdir)

    def replay_of(path: Path) -> None:
        replay(replace(CONFIG, train=replace(CONFIG.train, replay=str(path))), workdir)

    with pytest.raises(ReplayError, match="no such file"):
        replay_of(tmp_path / "nothing.npz")
    (tmp_path / "text.npz").write_text("text")
    with pytest.raises(ReplayError, match="is not the file of a batch"):
        replay_of(tmp_path / "text.npz")
    (tmp_path / "cut.npz").write_bytes(file.read_bytes()[:300])
    with pytest.raises(ReplayError, match="is not the file of a batch"):
        replay_of(tmp_path / "cut.npz")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(ReplayError, match=r"has no array 'images\.pixels'"):
        replay_of(tmp_path / "other.npz")
    (workdir / "checkpoints" / "4").rename(tmp_path / "4")
    with pytest.raises(CheckpointError, match="no checkpoint of step 4 in"):
        replay_of(file)


def test_its_checkpoint_stays_as_long_as_its_file(stopped, monkeypatch):
    workdir, _ = stopped
    longer = replace(CONFIG.train, steps=12, non_finite="skip", keep_checkpoints=2, keep_best="")
    train(replace(CONFIG, train=longer), workdir)
    assert steps(workdir / "checkpoints") == [4, 10, 12]
    (workdir / "non_finite" / "step_5.npz").unlink()
    train(replace(CONFIG, train=replace(longer, steps=14)), workdir)
    assert steps(workdir / "checkpoints") == [12, 14]


def test_skips_and_counts(tmp_path, monkeypatch, caplog):
    """The update is left out, the run goes on, also across a restart; the count is in the log."""
    monkeypatch.setenv("TOY_POISON", "3")
    skip = replace(CONFIG, train=replace(CONFIG.train, non_finite="skip"))
    train(skip, tmp_path / "whole")
    assert "skipped (1 so far): step 3: gradient_norm, l1/layer_1, total not finite; images [" in caplog.text
    rows = logged(tmp_path / "whole")
    assert [row["skipped"] for row in rows] == [0, 0, 1, 1, 1, 1]
    of_rates = {f"learning_rate/{part}" for part in ("detector", "backbone", "generator")}
    late = replace(skip, optimizer=replace(skip.optimizer, decay_steps=(4,)))
    train(late, tmp_path / "late")
    rates = [row["learning_rate/detector"] for row in logged(tmp_path / "late")]
    assert rates[-1] < rates[0] == rates[4], "the fourth update is that of step 5, as step 3 was none"
    assert set(rows[2]) == {"step", "naming", "skipped"} | of_rates, "only what is finite is logged"
    assert not (tmp_path / "whole" / "non_finite").exists()
    train(replace(skip, train=replace(skip.train, steps=4)), tmp_path / "parts")
    train(skip, tmp_path / "parts")
    assert logged(tmp_path / "parts") == rows
    assert_same_checkpoint(tmp_path / "parts", tmp_path / "whole", 6, skip)


def test_a_stopped_run_goes_on_when_it_may_skip(stopped, monkeypatch):
    workdir, _ = stopped
    train(replace(CONFIG, train=replace(CONFIG.train, non_finite="skip")), workdir)
    rows = logged(workdir)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["skipped"] for row in rows[4:]] == [1, 1]


def test_several_devices(tmp_path):
    """A run on two devices, and its replay there."""
    two = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "TOY_POISON": 3}
    done = run(tmp_path, **two)
    assert done.status == 1
    assert "step 3: gradient_norm, l1/layer_1, total not finite" in done.err
    out = run_well(tmp_path, "--mode=replay", f"train.replay={tmp_path / 'non_finite' / 'step_3.npz'}", **two)
    assert "first: decoder, in " in out


def test_several_processes(tmp_path):
    """All stop at the same step; the batch and the message are of all."""
    first, second = (finish(process) for process in start_processes(tmp_path, 2, TOY_POISON=3))
    assert (first.status, second.status) == (1, 1), first.err + second.err
    found = load_batch(tmp_path / "non_finite" / "step_3.npz")
    assert len(found.image_ids) == len(found.batch.images.pixels) == 2
    assert len(set(found.image_ids.tolist())) == 2
    for process, own in zip((first, second), found.image_ids.tolist(), strict=True):
        assert f"not finite; images [{own}] (of all processes: {found.image_ids.tolist()})" in process.err
    assert steps(tmp_path / "checkpoints") == [2]
