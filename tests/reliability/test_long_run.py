"""The whole program for long: memory stays flat, nothing is compiled again."""

import json

import numpy as np
import pytest

from opendet_jax.intact import steps
from tests.reliability.programs import run_well

pytestmark = pytest.mark.slow


def rows(workdir, settled: int, **fields: int) -> list[dict[str, float]]:
    """Of a run's logged steps after the `settled`th: step, memory in MiB, programs compiled."""
    changes = [f"train.{field}={value}" for field, value in fields.items()]
    out = run_well(workdir, *changes, module="tests.reliability.long_run")
    found = [row for row in json.loads(out.splitlines()[-1]) if row["step"] > settled]
    assert len(found) == (fields["steps"] - settled) // fields["log_every"]
    assert {row["compiled"] for row in found} == {found[0]["compiled"]}
    return found


def growth(found: list[dict[str, float]]) -> float:
    """MiB a step, by a line through all of them."""
    return np.polyfit([row["step"] for row in found], [row["memory"] for row in found], 1)[0]


def test_2000_steps_with_evaluations(tmp_path):
    found = rows(tmp_path, settled=600, steps=2000, log_every=50, eval_every=500, checkpoint_every=2000)
    a_thousand = growth(found) * 1000
    print(f"{found[-1]['compiled']} programs, {found[-1]['memory']:.0f} MiB, {a_thousand:+.1f} MiB in 1,000 steps")
    assert a_thousand < 10
    assert steps(tmp_path / "checkpoints")[-1] == 2000


def test_100_checkpoints(tmp_path):
    """TensorStore's `Spec.to_json`, which Orbax calls for every array of a save, never gives back 0.25 KiB."""
    found = rows(tmp_path, settled=200, steps=500, log_every=20, eval_every=500, checkpoint_every=5)
    a_save = growth(found) * 5
    print(f"{found[-1]['memory']:.0f} MiB, {a_save:+.2f} MiB a checkpoint")
    assert a_save < 1
