"""Work on each device: what is split by images communicates nothing, beside what XLA splits by itself."""

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize("program", ["deformable_attention_on_two_devices", "tensor_on_two_devices"])
def test_on_two_devices(program):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    done = subprocess.run(
        [sys.executable, "-m", f"tests.ops.{program}"],
        env={**os.environ, "XLA_FLAGS": flags.strip(), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("ok")
