"""The machines that programs are compiled for, with the rates that their makers publish, and the times that no step can
beat at these rates: for what it must compute, move and send.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from jax.experimental import topologies

from opendet_jax.errors import InputError

GIB = 2.0**30
TPU, GPU = "cloud.google.com/tpu/docs", "nvidia.com/en-us/data-center/h100"
# What XLA wants to know of an H100 (SXM5, 80 GB), as protocol buffer text.
H100 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 10 }
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  device_memory_size: 84978434048
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_core: 233472
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}
"""


class TopologyError(InputError):
    """A topology that no compiler here can describe."""


@dataclass(frozen=True)
class Machine:
    """Of one device. Rates are the highest that its maker states, so that times from them are bounds."""

    name: str
    platform: str
    flops: float  # a second, bfloat16 with float32 sums
    memory: float  # bytes
    memory_rate: float  # bytes a second
    link_rate: float  # bytes a second that it can send to other devices of its slice or node
    source: str
    compiler_options: dict[str, Any] = field(default_factory=dict)


MACHINES = {
    machine.name: machine
    for machine in (
        Machine("v4", "tpu", 275e12, 32 * GIB, 1228e9, 300e9, TPU),
        Machine("v5e", "tpu", 197e12, 16 * GIB, 819e9, 200e9, TPU),
        Machine("v5p", "tpu", 459e12, 95 * GIB, 2765e9, 600e9, TPU),
        Machine("v6e", "tpu", 918e12, 32 * GIB, 1640e9, 448e9, TPU),
        # Triton's products need a GPU to choose their tiles by trial; without one XLA finds none for some shapes.
        Machine("h100", "cuda", 989e12, 80e9, 3352e9, 450e9, GPU, {"xla_gpu_enable_triton_gemm": False}),
    )
}


def describe(topology: str) -> tuple[Machine, Sequence[Any]]:
    """The machine and the devices of "v5e:4x4" (a slice of TPUs), "h100:8" (GPUs of one node).

    Raises:
      TopologyError: there is no such machine or slice, or its compiler is not installed.
    """
    name, _, shape = topology.partition(":")
    machine = MACHINES.get(name.lower())
    if machine is None or not re.fullmatch(r"\d+(x\d+)*", shape):
        known = ", ".join(MACHINES)
        raise TopologyError(f"--topology={topology}: must be MACHINE:SHAPE, such as v5e:4x4 or h100:8, of {known}")
    try:
        if machine.platform == "tpu":
            found = topologies.get_topology_desc(f"{machine.name}:{shape}", "tpu")
        else:
            count = int(shape)
            found = topologies.get_topology_desc("H100", "cuda", target_config=H100, topology=f"1x1x{count}")
    except Exception as error:  # whatever the compiler's plugin makes of it
        reason = str(error).strip().partition("\n")[0]
        raise TopologyError(f"--topology={topology}: {reason}; `make .venv-compile/done` has the compilers") from error
    return machine, found.devices


@dataclass(frozen=True)
class Bound:
    """Seconds of a step on each device, each alone as if the others took no time."""

    compute: float  # floating-point operations at the bfloat16 peak
    memory: float  # parameters and optimizer state read once and written once
    communication: float  # what a ring must send of every collective

    @property
    def step(self) -> float:
        """No step is shorter: the longest of the three, as if they overlapped perfectly."""
        return max(self.compute, self.memory, self.communication)

    @property
    def limit(self) -> str:
        """Which of the three it is."""
        return max(asdict(self), key=lambda name: getattr(self, name))

    @property
    def communication_share(self) -> float:
        """Of a step in which nothing overlaps."""
        return self.communication / (self.compute + self.memory + self.communication)

    def report(self, images: int) -> dict[str, Any]:
        """Of a batch of `images`."""
        return {
            **{f"{name}_seconds": seconds for name, seconds in asdict(self).items()},
            "step_seconds": self.step,
            "image_seconds": self.step / images,
            "limit": self.limit,
            "communication_share": self.communication_share,
        }


def bound(machine: Machine, flops: float, state_bytes: int, bytes_sent: float) -> Bound:
    """Operations that are not counted (in kernels, in the rounds of a loop after the first) only make a step longer."""
    return Bound(flops / machine.flops, 2 * state_bytes / machine.memory_rate, bytes_sent / machine.link_rate)
