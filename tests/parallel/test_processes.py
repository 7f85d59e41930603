"""How processes find each other: as SLURM says; and what is said where there is nobody to find."""

import os
import subprocess
import sys

import pytest

from opendet_jax.config import MeshConfig
from opendet_jax.parallel.processes import ProcessError, join_processes

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
