"""kill −9 at any moment, in the middle of a save too: the next start goes on from the newest complete checkpoint."""

import random
import re
import time
from pathlib import Path

import pytest

from opendet_jax.checkpoints.intact import steps, unfinished
from tests.reliability.programs import assert_same_run, finish, run, run_well, saving, start, tiny, wait_for

SOON = ("train.steps=40", "train.checkpoint_every=1")  # a save goes on nearly all the time
CONFIG = tiny(steps=40, checkpoint_every=1)
KILLS = 20


def continued_from(out: str) -> int:
    found = re.search(r"continuing from step (\d+) of", out)
    return int(found[1]) if found else 0


def test_killed_in_the_middle_of_a_save(tmp_path):
    """What was being written is reported and removed; the run ends as if nothing had happened."""
    killed = tmp_path / "killed"
    process = start(killed, *SOON, TOY_SLEEP=0.02)
    wait_for(lambda: saving(killed), process)
    process.kill()
    process.communicate()
    checkpoints = killed / "checkpoints"
    complete, left = steps(checkpoints), unfinished(checkpoints)
    assert complete
    assert left, "it was in the middle of a save"
    done = run(killed, *SOON)
    assert done.status == 0, done.err
    assert continued_from(done.out) == complete[-1]
    assert f"{left[0].name}: a save that was cut off; ignored and removed" in done.err
    assert not unfinished(checkpoints)
    run_well(tmp_path / "whole", *SOON)
    assert_same_run(killed, tmp_path / "whole", 40, CONFIG)


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path):
    """Twenty times, each at another moment of start, steps, saves, the end: never is a complete checkpoint lost."""
    killed, moments = tmp_path / "killed", random.Random(0)
    began = time.monotonic()
    run_well(tmp_path / "whole", *SOON, TOY_SLEEP=0.2)
    length = time.monotonic() - began
    in_a_save, newest, left = 0, 0, []
    for _ in range(KILLS):
        process = start(killed, *SOON, TOY_SLEEP=0.2)
        time.sleep(moments.uniform(0.1 * length, 0.9 * length))
        process.kill()
        out, err = process.communicate()
        if left and continued_from(out):
            assert f"{left[0].name}: a save that was cut off; ignored and removed" in err
        assert "damaged" not in err, err
        assert continued_from(out) in (0, newest), "0: it did not come so far"
        assert not newest or "STARTING FROM NOTHING" not in out, "beside complete checkpoints"
        left = unfinished(killed / "checkpoints")
        in_a_save += bool(left)
        complete = steps(killed / "checkpoints")
        assert not complete or complete[-1] >= newest
        newest = complete[-1] if complete else newest
        if newest == 40:
            killed.rename(tmp_path / f"killed_{len(list(tmp_path.iterdir()))}")
            newest, left = 0, []
    print(f"{in_a_save} of {KILLS} kills were in a save")
    assert in_a_save
    assert continued_from(run_well(killed, *SOON)) == newest
    for folder in tmp_path.glob("killed*"):
        run_well(folder, *SOON)
        assert_same_run(folder, tmp_path / "whole", 40, CONFIG)


def test_a_process_that_is_gone_leaves_its_folder_usable(tmp_path):
    """Killed before anything was saved: the next start begins at step 0."""
    process = start(tmp_path, *SOON, TOY_SLEEP=600)
    wait_for((tmp_path / "config.json").exists, process)
    process.kill()
    assert finish(process).status == -9
    out = run_well(tmp_path, "train.steps=1")
    assert "STARTING FROM NOTHING" in out
    assert steps(Path(tmp_path) / "checkpoints") == [1]
