"""The whole program for many steps, with checkpoints and evaluations on the way; prints its memory and compilations.

    python -m tests.reliability.long_run --config=tests/reliability/tiny.py --workdir=DIR …

The last line is json: of every logged step the memory in MiB and the number of programs compiled so far.
"""

import ctypes
import gc
import json
import os
from pathlib import Path

import jax
from absl import app

from opendet_jax import main
from opendet_jax.train.run import Run

compiled = 0
rows: list[dict[str, float]] = []


def count(event: str, _seconds: float, **_) -> None:
    global compiled
    compiled += event == "/jax/core/compile/backend_compile_duration"


def held() -> float:
    """Resident memory in MiB, when what was freed is given back: glibc keeps it for the threads that come and go with
    checkpoints, each with a store of its own, and that levels off only after thousands of steps."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def run(arguments: list[str]) -> None:
    jax.monitoring.register_event_duration_secs_listener(count)
    log = Run.log

    def log_and_measure(self: Run, terms) -> None:
        log(self, terms)
        rows.append({"step": self.step, "memory": held(), "compiled": compiled})

    Run.log = log_and_measure
    main.main(arguments)
    print(json.dumps(rows))


if __name__ == "__main__":
    app.run(run, flags_parser=main.parse_flags)
