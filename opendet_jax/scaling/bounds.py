"""Times that no step can beat: from what it must compute, move and send, at the rates that the makers publish."""

from dataclasses import asdict, dataclass
from typing import Any

from opendet_jax.scaling.machines import Machine


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
