"""The small program in processes of its own, and in this one; and what a run has left, to compare."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from opendet_jax.checkpoints.intact import steps, unfinished
from opendet_jax.config import Config
from opendet_jax.config_files import parse_config
from opendet_jax.parallel.mesh import make_mesh
from opendet_jax.train.checkpoint import Checkpoints
from opendet_jax.train.optimizer import TrainState, abstract_state, make_optimizer
from tests.reliability.tiny import get_config

TOY, WHOLE = "tests.reliability.toy", "opendet_jax.main"
# Without PyTorch, which TensorBoard's writer imports where it is installed: two seconds a process.
AS_USERS = str(Path(__file__).with_name("as_users"))
PATIENCE = 1800  # seconds: 2,000 steps on a busy machine


def tiny(**train: Any) -> Config:
    """The config of tiny.py with other fields of `train`."""
    config = parse_config(get_config())
    return replace(config, train=replace(config.train, **train))


def start(
    workdir: Path, *overrides: str, module: str = TOY, under: Sequence[str] = (), **environment: Any
) -> subprocess.Popen:
    """The program in another process; overrides are config fields ("train.steps=4") or flags ("--mode=replay")."""
    flags = [text if text.startswith("--") else f"--config.{text}" for text in overrides]
    command = [
        *under,
        sys.executable,
        "-m",
        module,
        "--config=tests/reliability/tiny.py",
        f"--workdir={workdir}",
        *flags,
    ]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": AS_USERS, **{name: str(value) for name, value in environment.items()}},
    )


@dataclass(frozen=True)
class Finished:
    status: int
    out: str
    err: str


def finish(process: subprocess.Popen) -> Finished:
    out, err = process.communicate(timeout=PATIENCE)
    return Finished(process.returncode, out, err)


def run(workdir: Path, *overrides: str, **given: Any) -> Finished:
    return finish(start(workdir, *overrides, **given))


def run_well(workdir: Path, *overrides: str, **given: Any) -> str:
    """What a run that ends with status 0 prints."""
    done = run(workdir, *overrides, **given)
    assert done.status == 0, done.err
    return done.out


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def start_processes(workdir: Path, count: int, *overrides: str, **given: Any) -> list[subprocess.Popen]:
    """The program in `count` processes that train one model."""
    port = free_port()
    group = (f"mesh.processes={count}", f"mesh.coordinator=localhost:{port}")
    return [start(workdir, *overrides, *group, f"mesh.process={number}", **given) for number in range(count)]


def wait_for(happened: Callable[[], bool], process: subprocess.Popen, every: float = 0.001) -> None:
    """Until something has happened, which it must before the process ends."""
    end = time.monotonic() + PATIENCE
    while not happened():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, "nothing happened"
        time.sleep(every)


def wait_for_line(text: str, process: subprocess.Popen) -> None:
    """Until the process has said something on its standard error."""
    assert process.stderr
    for line in process.stderr:
        if text in line:
            return
    raise AssertionError(f"it never said {text!r}")


def saving(workdir: Path) -> bool:
    """Whether a checkpoint is being written right now, after a complete one."""
    folder = workdir / "checkpoints"
    return bool(steps(folder)) and bool(unfinished(folder))


def logged(workdir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def template(config: Config) -> TrainState:
    from opendet_jax.model.opendet import OpenDet

    model, optimizer = OpenDet(config.model, config.ablation), make_optimizer(config.optimizer, config.ablation)
    return abstract_state(model, optimizer, config, make_mesh(replace(config.mesh, processes=1)))


def restored(workdir: Path, step: int, config: Config) -> tuple[TrainState, dict[str, Any]]:
    """The state and the iterator's state of a checkpoint, as numpy arrays."""
    checkpoints = Checkpoints(workdir, config, read_only=True)
    state, iterator_state = checkpoints.restore(template(config), step)
    checkpoints.close()
    return jax.device_get(state), iterator_state


def assert_same_checkpoint(one: Path, other: Path, step: int, config: Config) -> None:
    """Bitwise the same parameters and optimizer, and the same place in the data."""
    (left, left_data), (right, right_data) = restored(one, step, config), restored(other, step, config)
    assert left_data == right_data
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


def assert_same_run(one: Path, other: Path, step: int, config: Config) -> None:
    """The same, and bitwise the same losses on the way there."""
    assert logged(one) == logged(other)
    assert_same_checkpoint(one, other, step, config)
