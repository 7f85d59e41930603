"""How processes find each other: as SLURM says; what is said where there is nobody to find. One training a workdir."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from opendet_jax.config import MeshConfig
from opendet_jax.parallel import processes as module
from opendet_jax.parallel.processes import (
    DEAD,
    LOCK,
    LockError,
    ProcessError,
    check_held,
    join_processes,
    only_training,
)

JOIN = """
import jax
from opendet_jax.config import MeshConfig
from opendet_jax.parallel.processes import exchange, join_processes
join_processes(MeshConfig(processes=0))
print(jax.process_index(), jax.process_count(), exchange(10 + jax.process_index()))
"""


def test_as_slurm_says():
    job = {"SLURM_JOB_ID": str(20_000 + os.getpid() % 10_000), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    job |= {"SLURM_STEP_NUM_NODES": "1", "JAX_PLATFORMS": "cpu"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", JOIN],
            env={**os.environ, **job, "SLURM_PROCID": str(number), "SLURM_LOCALID": str(number)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    for number, process in enumerate(processes):
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert out.splitlines()[-1] == f"{number} 2 [10, 11]"


def test_no_cluster_to_ask(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("SLURM_", "OMPI_", "KUBERNETES_"))]:
        monkeypatch.delenv(name)
    with pytest.raises(
        ProcessError, match=r"config.mesh.processes = 0: no cluster that JAX knows .* give mesh.processes"
    ):
        join_processes(MeshConfig(processes=0))


HERE, NUMBERING = module._ME["host"], module._ME["numbering"]


def left(workdir: Path, host: str, process: int, silent: float = 0.0, numbering: str = NUMBERING) -> Path:
    """The file of another training, which showed its last sign of life so many seconds ago."""
    path, since = workdir / LOCK, "2026-01-01 12:00:00"
    held = {"host": host, "numbering": numbering, "process": process, "token": "other", "since": since}
    path.write_text(json.dumps(held))
    then = time.time() - silent
    os.utime(path, (then, then))
    return path


@pytest.fixture
def dead() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_workdir_is_held_and_released(tmp_path):
    with only_training(tmp_path / "run"):
        held = json.loads((tmp_path / "run" / LOCK).read_text())
        assert (held["host"], held["process"]) == (HERE, os.getpid())
        check_held(tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []
    with pytest.raises(ZeroDivisionError), only_training(tmp_path / "run"):
        _ = 1 / 0
    assert list((tmp_path / "run").iterdir()) == []


def test_not_twice_in_one_process_either(tmp_path):
    with only_training(tmp_path), pytest.raises(LockError, match=f"process {os.getpid()} on"), only_training(tmp_path):
        raise AssertionError("held twice")
    assert not (tmp_path / LOCK).exists()
    with only_training(tmp_path / "a"), only_training(tmp_path / "b"):
        pass


def test_another_that_lives_is_named(tmp_path):
    path = left(tmp_path, HERE, os.getppid())
    with pytest.raises(LockError, match=rf"process {os.getppid()} on {HERE} \(begun .*\) trains here"):
        only_training(tmp_path).__enter__()
    assert "other" in path.read_text()


def test_of_another_machine_it_is_said_what_to_remove(tmp_path, dead):
    path = left(tmp_path, "elsewhere", dead)
    with pytest.raises(LockError, match=rf"on elsewhere \(begun .*\) trains here, .* remove {path} or wait 120 s"):
        only_training(tmp_path).__enter__()
    assert path.exists()


def test_in_another_container_of_one_name_numbers_say_nothing(tmp_path, dead):
    for process in (dead, os.getpid()):
        path = left(tmp_path, HERE, process, numbering="another container")
        with pytest.raises(LockError, match=rf"process {process} on {HERE} .* trains here"):
            only_training(tmp_path).__enter__()
        assert "other" in path.read_text()


@pytest.mark.parametrize("what", ["dead here", "this number", "silent here", "silent there"])
def test_what_a_training_that_is_gone_has_left_is_taken_over(tmp_path, dead, what, monkeypatch, caplog):
    monkeypatch.setattr(module, "SETTLED", 0.01)
    host, process, silent = {
        "dead here": (HERE, dead, 0.0),
        "this number": (HERE, os.getpid(), 0.0),
        "silent here": (HERE, os.getppid(), DEAD + 5),
        "silent there": ("elsewhere", 1, DEAD + 5),
    }[what]
    left(tmp_path, host, process, silent)
    with only_training(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["process"] == os.getpid()
        who = f"process {process} on {host} (begun 2026-01-01 12:00:00)"
        assert f"left by {who}, which is gone; taken over" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_says_nothing(tmp_path, monkeypatch):
    """It is just being written, or was never finished."""
    monkeypatch.setattr(module, "SETTLED", 0.01)
    for text in ("", "{", "[]", '{"process": "x"}'):
        (tmp_path / LOCK).write_text(text)
        with pytest.raises(LockError, match="trains here"):
            only_training(tmp_path).__enter__()
        os.utime(tmp_path / LOCK, (0, 0))
        with only_training(tmp_path):
            check_held(tmp_path)


def test_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BEAT", 0.01)
    with only_training(tmp_path):
        os.utime(tmp_path / LOCK, (0, 0))
        end = time.monotonic() + 30
        while (tmp_path / LOCK).stat().st_mtime < time.time() - 60:
            assert time.monotonic() < end
            time.sleep(0.01)


def test_who_was_taken_for_dead_is_told_and_leaves_the_other_its_file(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BEAT", 0.01)
    with only_training(tmp_path):
        path = left(tmp_path, "elsewhere", 7, silent=50.0)
        before = path.stat().st_mtime
        with pytest.raises(LockError, match=r"process 7 on elsewhere .* has taken it over"):
            check_held(tmp_path)
        time.sleep(0.1)
        assert path.stat().st_mtime == before
    assert path.exists()


def test_a_workdir_that_goes_takes_its_file_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BEAT", 0.01)
    with only_training(tmp_path / "run"):
        (tmp_path / "run" / LOCK).unlink()
        (tmp_path / "run").rmdir()
        time.sleep(0.05)
        check_held(tmp_path / "run")


def test_of_several_that_take_over_at_once_the_last_holds_it(tmp_path, dead, monkeypatch):
    monkeypatch.setattr(module, "SETTLED", 0.0)
    left(tmp_path, HERE, dead)
    replaced = module._replace

    def and_another(path):
        replaced(path)
        left(tmp_path, HERE, os.getppid())

    monkeypatch.setattr(module, "_replace", and_another)
    with pytest.raises(LockError, match=f"process {os.getppid()} on .* trains here; name another --workdir"):
        only_training(tmp_path).__enter__()


def test_a_workdir_that_cannot_be_used(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(LockError, match="file: cannot be made: File exists"):
        only_training(tmp_path / "file").__enter__()
    (tmp_path / LOCK).mkdir()
    with pytest.raises(LockError):
        only_training(tmp_path).__enter__()
