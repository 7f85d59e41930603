"""Memory where it would hurt: as many detections as LVIS minival can have. docs/evaluate.md has the last figures."""

import json
import subprocess
import sys

import pytest

IMAGES = 4809


@pytest.mark.slow
def test_memory_at_the_scale_of_minival(tmp_path):
    """65 million detections, kept whole, would be tens of GiB."""
    command = [sys.executable, "-m", "tests.evaluate.at_minival_scale", str(IMAGES), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=7200)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    print(figures)
    assert figures["after"] - figures["before"] < 2048  # MiB
    with (tmp_path / "eval" / "minival" / "predictions.json").open() as file:
        assert sum(1 for _ in file) == IMAGES * 300 + 2
