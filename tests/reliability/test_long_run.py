"""2,000 steps of the whole program: memory stays flat, nothing is compiled again."""

import json

import numpy as np
import pytest

from opendet_jax.checkpoints.intact import steps
from tests.reliability.programs import run_well

STEPS, LOG, SAVE = 2000, 20, 40
SETTLED = 600  # steps, 15 evaluations and checkpoints among them: each of the first twelve adds to what is held
MAY_GROW = 10.0  # MiB in a thousand steps


@pytest.mark.slow
def test_long_runs(tmp_path):
    """With 50 evaluations, and as many checkpoints."""
    out = run_well(
        tmp_path,
        *(
            f"train.steps={STEPS}",
            f"train.log_every={LOG}",
            f"train.checkpoint_every={SAVE}",
            f"train.eval_every={SAVE}",
        ),
        module="tests.reliability.long_run",
    )
    rows = [row for row in json.loads(out.splitlines()[-1]) if row["step"] > SETTLED]
    assert len(rows) == (STEPS - SETTLED) // LOG
    assert {row["compiled"] for row in rows} == {rows[0]["compiled"]}
    growth = np.polyfit([row["step"] for row in rows], [row["memory"] for row in rows], 1)[0] * 1000
    print(f"{rows[-1]['compiled']} programs, {rows[-1]['memory']:.0f} MiB, {growth:+.1f} MiB in 1,000 steps")
    assert growth < MAY_GROW
    assert steps(tmp_path / "checkpoints")[-1] == STEPS
