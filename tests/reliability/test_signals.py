"""SIGTERM and SIGINT: the step is finished, everything saved, exit 0 with a message; a second one leaves at once."""

import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest

from opendet_jax.checkpoints.intact import steps
from opendet_jax.parallel.processes import LOCK
from opendet_jax.train import run as run_module
from opendet_jax.train.checkpoint import Checkpoints
from opendet_jax.train.metrics import MetricsLog
from opendet_jax.train.run import Run
from opendet_jax.train.signals import PATIENCE, Stopped, StopSignals
from opendet_jax.train.training_loop import train
from tests.reliability.programs import (
    assert_same_run,
    finish,
    logged,
    run_well,
    saving,
    start,
    start_processes,
    tiny,
    wait_for,
    wait_for_line,
)

pytestmark = pytest.mark.slow  # minutes
CONFIG = tiny(steps=6, checkpoint_every=0)


def kill_at_line(monkeypatch, step: int, number: int) -> None:
    """This process gets a signal while it logs a step."""
    write = MetricsLog.write

    def write_and_kill(log, now, values):
        write(log, now, values)
        if now == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(MetricsLog, "write", write_and_kill)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_step_is_finished_and_saved(tmp_path, monkeypatch, capfd, number):
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        kill_at_line(patch, 3, number)
        train(CONFIG, tmp_path / "run")
    out, err = capfd.readouterr()
    assert f"{number.name}: stopped after step 3 of 6, which is saved; the same command continues from it" in out
    assert f"{number.name}: finishing the step, then saving; once more: leaving at once" in err
    assert steps(tmp_path / "run" / "checkpoints") == [3]
    assert not (tmp_path / "run" / "evaluations.jsonl").read_text()
    assert signal.getsignal(number) is before, "the caller's own handler is back"
    train(CONFIG, tmp_path / "run")
    train(CONFIG, tmp_path / "whole")
    assert_same_run(tmp_path / "run", tmp_path / "whole", 6, CONFIG)


def test_an_evaluation_is_given_up(tmp_path, monkeypatch, capsys):
    """It can be repeated; the state was saved before it began."""

    def endless(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(600)

    monkeypatch.setattr(run_module, "evaluate", endless)
    began = time.monotonic()
    train(tiny(steps=6, eval_every=2, checkpoint_every=0), tmp_path)
    assert time.monotonic() - began < 300
    assert "SIGTERM: stopped after step 2 of 6, which is saved" in capsys.readouterr().out
    assert steps(tmp_path / "checkpoints") == [2]


def test_before_the_first_step(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_module, "load_datasets", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    train(CONFIG, tmp_path)
    assert "SIGTERM: stopped before the first step; there is nothing to save" in capsys.readouterr().out
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("what", ["init", "step"])
def test_while_the_first_program_is_compiled(tmp_path, what, number):
    """Python hears nothing meanwhile; there is nothing to lose, and nothing is left."""
    process = start(tmp_path, TOY_COMPILE=what)
    wait_for_line(f"compiling {what}", process)
    sent = time.monotonic()
    process.send_signal(number)
    done = finish(process)
    assert time.monotonic() - sent < 10
    assert done.status == 0, done.err
    assert f"{number.name}: stopped before the first step; there is nothing to save" in done.out
    assert steps(tmp_path / "checkpoints") == []
    assert not (tmp_path / LOCK).exists()
    assert "STARTING FROM NOTHING" in run_well(tmp_path, "train.steps=1")


def test_while_the_last_evaluation_is_compiled(tmp_path):
    """All steps are saved by then."""
    process = start(tmp_path, TOY_COMPILE="evaluation")
    wait_for_line("compiling evaluation", process)
    sent = time.monotonic()
    process.send_signal(signal.SIGTERM)
    done = finish(process)
    assert time.monotonic() - sent < 10
    assert done.status == 0, done.err
    assert "SIGTERM: stopped after step 6 of 6, which is saved; the same command continues from it" in done.out
    assert steps(tmp_path / "checkpoints")[-1] == 6
    assert "continuing from step 6 of" in run_well(tmp_path), "it evaluates"


def test_a_run_that_goes_on_has_its_checkpoint_when_the_first_program_is_compiled(tmp_path):
    run_well(tmp_path, "train.steps=2")
    process = start(tmp_path, "train.steps=4", TOY_COMPILE="step")
    wait_for_line("compiling step", process)
    process.send_signal(signal.SIGTERM)
    done = finish(process)
    assert (done.status, "stopped before the first step" in done.out) == (0, True), done.err
    assert steps(tmp_path / "checkpoints") == [2]


def test_a_step_that_takes_long_is_finished(tmp_path):
    """After the first there is something to lose, and no haste."""
    process = start(tmp_path, "train.steps=1000", "train.checkpoint_every=0", TOY_SLEEP=2 * PATIENCE)
    wait_for_line("making batch 8", process)  # some are made ahead
    process.send_signal(signal.SIGTERM)
    done = finish(process)
    assert done.status == 0, done.err
    message = re.search(r"SIGTERM: stopped after step (\d+) of 1000, which is saved", done.out)
    assert message
    assert steps(tmp_path / "checkpoints") == [int(message[1])]


def test_signals_only_where_they_may_interrupt():
    with StopSignals() as signals:
        signals.defer()
        signals.check()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped, match="SIGTERM"):
            signals.check()
        with pytest.raises(Stopped), signals.interrupting():
            raise AssertionError("what came before is not forgotten")


def test_exit_status_and_the_second_signal(tmp_path):
    """From outside: one signal ends with 0 and a checkpoint; two end at once, in the middle of a long step."""
    workdir: Path = tmp_path / "run"
    process = start(workdir, "train.steps=1000", TOY_SLEEP=0.05)
    wait_for(lambda: (workdir / "metrics.jsonl").exists() and len(logged(workdir)) >= 3, process)
    process.send_signal(signal.SIGTERM)
    done = finish(process)
    assert done.status == 0, done.err
    message = re.search(r"SIGTERM: stopped after step (\d+) of 1000, which is saved", done.out)
    assert message
    assert steps(workdir / "checkpoints")[-1] == int(message[1])

    process = start(workdir, "train.steps=1000", TOY_SLEEP=600)
    wait_for_line("making batch", process)
    process.send_signal(signal.SIGTERM)
    wait_for_line("SIGTERM: finishing the step", process)
    sent = time.monotonic()
    process.send_signal(signal.SIGINT)
    done = finish(process)
    assert time.monotonic() - sent < 5
    assert done.status == 128 + signal.SIGINT
    assert "SIGINT again: leaving; the newest complete checkpoint stays" in done.err
    assert f"continuing from step {message[1]} of" in run_well(workdir, f"train.steps={int(message[1]) + 1}")


def test_the_second_signal_in_the_middle_of_a_save(tmp_path):
    """What was complete before stays usable."""
    process = start(tmp_path, "train.steps=1000", "train.checkpoint_every=1", TOY_SLEEP=0.05)
    wait_for(lambda: saving(tmp_path), process)
    complete = steps(tmp_path / "checkpoints")
    process.send_signal(signal.SIGTERM)
    wait_for_line("SIGTERM: finishing the step", process)
    process.send_signal(signal.SIGTERM)
    done = finish(process)
    assert done.status in (0, 128 + signal.SIGTERM), "0: it had saved everything by then"
    found = re.search(r"continuing from step (\d+) of", run_well(tmp_path, "train.steps=1"))
    assert found
    assert int(found[1]) >= complete[-1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_while_an_error_is_answered(tmp_path, monkeypatch, capsys, number):
    """What saves the run is not interrupted."""
    save = Checkpoints.save

    def save_and_kill(*arguments):
        os.kill(os.getpid(), number)
        save(*arguments)

    def fail(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(Run, "log", fail)
    monkeypatch.setattr(Checkpoints, "save", save_and_kill)
    with pytest.raises(RuntimeError, match="a bug"):
        train(CONFIG, tmp_path)
    assert "the state after step 1 is saved" in capsys.readouterr().err
    assert steps(tmp_path / "checkpoints") == [1]


def test_all_processes_end_where_the_first_cannot_write_its_log(tmp_path):
    """Together, with the state saved; the others know no more than that."""
    processes = start_processes(tmp_path, 2, "train.steps=100000", "train.checkpoint_every=0", TOY_SLEEP=0.05)
    wait_for(lambda: (tmp_path / "metrics.jsonl").exists() and len(logged(tmp_path)) >= 3, processes[0])
    shutil.rmtree(tmp_path / "tensorboard")
    first, second = (finish(process) for process in processes)
    assert (first.status, second.status) == (1, 1), first.err + second.err
    assert "tensorboard: is gone; something removed it during training" in first.err
    assert "error: another process could not go on, and says why" in second.err
    saved = re.search(r"the state after step (\d+) is saved", first.err)
    assert saved, first.err
    assert steps(tmp_path / "checkpoints") == [int(saved[1])]


def test_all_processes_stop_at_the_same_step(tmp_path):
    """Whichever of them gets the signal; the others may get theirs at any moment after that."""
    processes = start_processes(tmp_path, 2, "train.steps=100000", "train.checkpoint_every=0", TOY_SLEEP=0.05)
    wait_for(lambda: (tmp_path / "metrics.jsonl").exists() and len(logged(tmp_path)) >= 3, processes[0])
    processes[1].send_signal(signal.SIGTERM)
    wait_for_line("SIGTERM: finishing the step", processes[1])
    time.sleep(0.2)
    processes[0].send_signal(signal.SIGTERM)
    first, second = (finish(process) for process in processes)
    assert (first.status, second.status) == (0, 0), first.err + second.err
    stopped = [re.search(r"SIGTERM: stopped after step (\d+)", done.out) for done in (first, second)]
    assert stopped[0]
    assert steps(tmp_path / "checkpoints") == [int(stopped[0][1])]
