"""The command as it is used: the whole step compiled for machines that are not here, by their own compilers."""

import json
import os
import subprocess

import pytest

from experiments.scaling.run import PYTHON

pytestmark = pytest.mark.slow  # minutes


@pytest.mark.parametrize(
    ("topology", "mesh", "counted_by"), [("v5e:2x2", "data:2,fsdp:2", "compiler"), ("h100:2", "data:2", "trace")]
)
def test_the_whole_step_is_compiled(tmp_path, topology, mesh, counted_by):
    if not PYTHON.exists():
        pytest.skip(f"{PYTHON}: `make .venv-compile/done` makes it")
    command = [PYTHON, "-m", "opendet_jax.scaling", "--config=tests/reliability/tiny.py", "--level=O0"]
    command += [f"--topology={topology}", f"--mesh={mesh}", f"--json={tmp_path / 'point.json'}"]
    environment = {name: value for name, value in os.environ.items() if name != "JAX_DISABLE_MOST_OPTIMIZATIONS"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert "never run: compiled ahead of time" in done.stdout
    found = json.loads((tmp_path / "point.json").read_text())
    assert found["devices"] == (4 if topology.startswith("v5e") else 2)
    memory = found["memory"]
    assert memory["peak"] >= memory["arguments"] >= memory["parameters"] + memory["optimizer"] > 0
    assert found["flops_counted_by"] == counted_by
    assert found["flops"] > 1e6
    assert found["collectives"]["all-reduce"]["bytes_sent"] > 0
    assert ("all-gather" in found["collectives"]) == ("fsdp" in mesh)
    assert found["bound"]["step_seconds"] > 0
