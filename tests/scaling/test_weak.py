"""Weak scaling on forced CPU devices: its table."""

import re
import subprocess
import sys

import pytest


@pytest.mark.slow  # a minute
def test_one_device():
    command = [sys.executable, "-m", "experiments.scaling.weak", "--devices", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    row = re.fullmatch(r"\| 1 \| 2 \| ([\d.]+) \| ([\d.]+) \|", done.stdout.splitlines()[-1])
    assert row, done.stdout
    seconds, rate = float(row[1]), float(row[2])
    assert rate == pytest.approx(2 / seconds, rel=0.02)
