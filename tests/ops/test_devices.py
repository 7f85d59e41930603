"""What runs on each device, beside what XLA splits."""

import os
import subprocess
import sys


def test_a_mesh_of_tensor_alone():
    """Images are not split, the weights are."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    done = subprocess.run(
        [sys.executable, "-m", "tests.ops.tensor_on_two_devices"],
        env={**os.environ, "XLA_FLAGS": flags.strip(), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("ok")
