"""Disks that are full, folders that are read-only or gone: a clear error, and the training state is not lost."""

import errno
import os
import re
import shutil
import time
from pathlib import Path

import pytest

from opendet_jax.checkpoints import intact
from opendet_jax.checkpoints.intact import steps
from opendet_jax.errors import InputError
from opendet_jax.train.checkpoint import SaveError
from opendet_jax.train.metrics import LogError, MetricsLog
from opendet_jax.train.training_loop import train
from tests.reliability.programs import Finished, assert_same_checkpoint, run, tiny

pytestmark = pytest.mark.slow  # minutes
CONFIG = tiny(steps=6)
# A small disk of its own at $0; what is on it is copied to $COPY, because it goes with the process.
FULL = 'mount -t tmpfs -o size=$SIZE none "$0" || exit 99; "$@"; status=$?; cp -r "$0" "$COPY"; exit $status'
READ_ONLY = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" || exit 99; exec "$@"'
# So it becomes when there is a checkpoint, at a moment when nothing is being written.
READ_ONLY_LATER = """mount --bind "$0" "$0" || exit 99
"$@" & while [ ! -d "$0/10" ]; do sleep 0.1; done
until mount -o remount,ro,bind "$0"; do sleep 0.01; done; wait $!"""


def run_on(script: str, disk: Path, workdir: Path, *overrides: str, **environment) -> Finished:
    """The program with another disk at `disk`."""
    disk.mkdir(parents=True, exist_ok=True)
    done = run(workdir, *overrides, under=["unshare", "-rm", "sh", "-c", script, str(disk)], **environment)
    if done.status == 99:
        pytest.skip(f"no disk can be mounted here: {done.err.strip()}")
    return done


def rescued(message: str) -> Path:
    """The checkpoint that an error says is elsewhere."""
    found = re.search(r"The state after step \d+ is in (\S+): move it to (\S+) to continue from it", message)
    assert found, message
    return Path(found[1])


def test_a_full_disk(tmp_path):
    """The newest complete checkpoint stays, the state after it is saved elsewhere; moved back, the run goes on."""
    (tmp_path / "tmp").mkdir()
    disk = tmp_path / "disk"
    place = {"SIZE": "1m", "COPY": str(tmp_path / "copy"), "TMPDIR": str(tmp_path / "tmp")}
    scenes = f"data.scenes_dir={tmp_path / 'scenes'}"
    often = ("train.steps=200", "train.checkpoint_every=1", "train.keep_checkpoints=200", scenes)
    done = run_on(FULL, disk, disk / "run", *often, **place)
    assert done.status == 1, done.err
    error = done.err[done.err.index("error: ") :]
    assert re.search(r"cannot (save the checkpoint of step \d+|be written): .*No space left on device", error), error
    place = rescued(error)
    checkpoints = tmp_path / "copy" / "run" / "checkpoints"
    assert steps(checkpoints)
    assert int(place.name) >= steps(checkpoints)[-1]
    if int(place.name) not in steps(checkpoints):
        shutil.move(place, checkpoints / place.name)
    reached = int(place.name)
    config = tiny(steps=reached + 2)
    overrides = (f"train.steps={reached + 2}", scenes)
    done = run(tmp_path / "copy" / "run", *overrides)
    assert f"continuing from step {reached} of" in done.out, done.err
    assert run(tmp_path / "whole", *overrides).status == 0
    assert_same_checkpoint(tmp_path / "copy" / "run", tmp_path / "whole", reached + 2, config)


def test_a_read_only_folder_is_noticed_before_training(tmp_path):
    done = run_on(READ_ONLY, tmp_path / "run" / "checkpoints", tmp_path / "run")
    assert done.status == 1
    assert f"error: {tmp_path}/run/checkpoints: cannot be used: Read-only file system" in done.err
    assert "Traceback" not in done.err


def test_a_folder_that_becomes_read_only(tmp_path):
    """What was learnt until then is elsewhere; older checkpoints stay."""
    checkpoints, place = tmp_path / "run" / "checkpoints", tmp_path / "tmp"
    place.mkdir()
    often = ("train.steps=1000", "train.checkpoint_every=10", "train.keep_checkpoints=1000")
    done = run_on(READ_ONLY_LATER, checkpoints, tmp_path / "run", *often, TMPDIR=str(place), TOY_SLEEP=0.05)
    assert done.status == 1, done.err
    error = done.err[done.err.index("error: ") :]
    assert "Read-only file system" in error
    moved = rescued(error)
    assert moved.is_relative_to(place)
    assert steps(checkpoints)[0] == 10
    assert int(moved.name) >= steps(checkpoints)[-1]


def failing(monkeypatch, step: int, folder: Path) -> None:
    """Saves of a step into a folder fail in Orbax's own thread."""
    write = intact.write_manifest

    def write_or_fail(checkpoint: Path) -> None:
        if checkpoint.name.startswith(f"{step}.") and folder in checkpoint.parents:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(checkpoint)

    monkeypatch.setattr(intact, "write_manifest", write_or_fail)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # Orbax's, which it passes on later
def test_a_save_that_fails_in_the_background(tmp_path, monkeypatch):
    """Is noticed without waiting for the next one; older checkpoints are not deleted for one that never came to be."""
    failing(monkeypatch, 4, tmp_path / "run")
    with pytest.raises(SaveError, match="cannot save the checkpoint of step 4: No space left on device") as error:
        train(tiny(steps=1000, keep_checkpoints=1), tmp_path / "run")
    assert "the newest complete one is of step 2" in str(error.value)
    assert steps(tmp_path / "run" / "checkpoints")[0] == 2


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_the_last_save(tmp_path, monkeypatch):
    """Fails at the end, and again for rescue: the state of the last step is elsewhere, whole."""
    with monkeypatch.context() as patch:
        patch.setattr("tempfile.tempdir", str(tmp_path))
        failing(patch, 6, tmp_path / "run")
        with pytest.raises(SaveError) as error:
            train(CONFIG, tmp_path / "run")
    place = rescued(str(error.value))
    assert place.is_relative_to(tmp_path)
    shutil.move(place, tmp_path / "run" / "checkpoints" / "6")
    train(CONFIG, tmp_path / "whole")
    assert_same_checkpoint(tmp_path / "run", tmp_path / "whole", 6, CONFIG)


@pytest.mark.parametrize("gone", ["tensorboard", "metrics.jsonl"])
def test_logs_that_are_gone(tmp_path, monkeypatch, gone, capsys):
    """The state is saved; started again, the run goes on with a log of its own."""
    write = MetricsLog.write

    def write_then_remove(log: MetricsLog, step: int, values) -> None:
        write(log, step, values)
        if step == 3:
            path = tmp_path / "run" / gone
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "write", write_then_remove)
        with pytest.raises(LogError, match=rf"run/{gone}: is gone; something removed it during training"):
            train(CONFIG, tmp_path / "run")
    assert "the state after step 4 is saved; the same command continues from it" in capsys.readouterr().err
    assert steps(tmp_path / "run" / "checkpoints") == [2, 4]
    train(CONFIG, tmp_path / "run")
    assert "continuing from step 4" in capsys.readouterr().out
    train(CONFIG, tmp_path / "whole")
    assert_same_checkpoint(tmp_path / "run", tmp_path / "whole", 6, CONFIG)


def test_a_workdir_that_is_gone(tmp_path, monkeypatch):
    """All of it, in the middle of training: what had been learnt is saved all the same."""
    write = MetricsLog.write

    def remove(log: MetricsLog, step: int, values) -> None:
        if step == 3:
            while not steps(tmp_path / "run" / "checkpoints"):  # that of step 2 is on its way
                time.sleep(0.01)
            shutil.rmtree(tmp_path / "run")
        write(log, step, values)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "write", remove)
        with pytest.raises(InputError, match="is gone"):
            train(CONFIG, tmp_path / "run")
    assert steps(tmp_path / "run" / "checkpoints") == [3]
    train(CONFIG, tmp_path / "run")
    train(CONFIG, tmp_path / "whole")
    assert_same_checkpoint(tmp_path / "run", tmp_path / "whole", 6, CONFIG)


def test_a_workdir_that_goes_during_an_evaluation(tmp_path, monkeypatch, capsys):
    """Its checkpoint, which was complete, goes with it: the state is saved once more."""

    def remove(*_) -> dict[str, float]:
        while not steps(tmp_path / "run" / "checkpoints"):
            time.sleep(0.01)
        shutil.rmtree(tmp_path / "run")
        return {"AP": 0.0}

    monkeypatch.setattr("opendet_jax.train.run.evaluate", remove)
    with pytest.raises(InputError, match="is gone"):
        train(tiny(steps=6, eval_every=3, checkpoint_every=0), tmp_path / "run")
    assert "the state after step 3 is saved" in capsys.readouterr().err
    assert steps(tmp_path / "run" / "checkpoints") == [3]


def test_any_other_error(tmp_path, monkeypatch, capsys):
    """An image that cannot be read, a bug in the evaluation: the finished steps are saved before it is shown."""
    monkeypatch.setattr("opendet_jax.train.run.evaluate", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(tiny(steps=6, eval_every=3, checkpoint_every=0), tmp_path)
    assert steps(tmp_path / "checkpoints") == [3]
    assert "the state after step 3 is saved" in capsys.readouterr().err


def test_curves_that_cannot_be_drawn_end_nothing(tmp_path, monkeypatch, caplog):
    def fail(_):
        raise ValueError("a line that was cut off")

    monkeypatch.setattr("opendet_jax.train.run.draw_curves", fail)
    train(CONFIG, tmp_path)
    assert steps(tmp_path / "checkpoints")[-1] == CONFIG.train.steps
    assert f"{tmp_path}/curves.png: cannot be drawn: a line that was cut off" in caplog.text


def test_a_log_that_cannot_be_written_from_the_start(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(LogError, match=r"metrics\.jsonl: cannot be written: Is a directory"):
        train(CONFIG, tmp_path)


def test_a_workdir_that_is_a_file(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(InputError, match="run: cannot be made: File exists"):
        train(CONFIG, tmp_path / "run")
