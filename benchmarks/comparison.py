"""Two programs for the same work, timed in turn in one process; their memory, each in a process of its own.

A ratio is the peer's time over ours in one round, so what else the machine does in a round slows both.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.multiply_adds import Product, seconds_alone, total

Run = Callable[[], Any]  # the work once, waiting for its end


@dataclass(frozen=True)
class Ours:
    run: Run
    compile_seconds: float
    work: list[Product] = field(default_factory=list)  # the matrix products and convolutions of one run


@dataclass(frozen=True)
class Case:
    """`ours` and `peer` prepare their programs; nothing is imported or allocated before they are called."""

    name: str
    ours: Callable[[], Ours]
    peer: Callable[[], Run] | None  # None: nothing does this work but ours
    agree: Callable[[Any, Any], None] | None = None  # raises where the results (ours, the peer's) differ
    least: float | None = None  # the ratio wanted
    repeats: int = 5


@dataclass(frozen=True)
class Result:
    name: str
    ours: float  # seconds, the median
    ratios: list[float]  # of the rounds: the peer's seconds over ours
    peer: float | None
    least: float | None  # the ratio wanted
    compile_seconds: float
    limit: float | None  # seconds that the multiply-adds alone take at the rate of a product of 1024³
    own_limit: float | None  # seconds of the work's own products, one by one
    our_memory: float  # GiB, the process's peak
    peer_memory: float | None


def use_cores(cores: int) -> None:
    """Give both programs this many cores. Before JAX and PyTorch start their threads."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    import torch

    torch.set_num_threads(cores)


def seconds(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def compare(case: Case, module: str, cores: int, repeats: int | None = None) -> Result:
    """`module` is the benchmark's own, to measure memory by."""
    ours, peer = case.ours(), case.peer() if case.peer else None
    mine = ours.run()  # what happens once only happens here
    if peer:
        theirs = peer()
        if case.agree:
            case.agree(mine, theirs)
        del theirs
    del mine
    bar = tqdm(range(repeats or case.repeats), desc=case.name, unit="round", leave=False)
    rounds = [(seconds(peer) if peer else 0.0, seconds(ours.run)) for _ in bar]
    compile_seconds, work = ours.compile_seconds, ours.work
    limits = (total(work) / matrix_rate(), seconds_alone(work)) if work else (None, None)
    del ours, peer
    gc.collect()  # the processes whose memory is measured need room
    return Result(
        case.name,
        ours=statistics.median(mine for _, mine in rounds),
        ratios=[theirs / mine for theirs, mine in rounds] if case.peer else [],
        peer=statistics.median(theirs for theirs, _ in rounds) if case.peer else None,
        least=case.least,
        compile_seconds=compile_seconds,
        limit=limits[0],
        own_limit=limits[1],
        our_memory=memory(module, case.name, "ours", cores),
        peer_memory=memory(module, case.name, "peer", cores) if case.peer else None,
    )


def matrix_rate(side: int = 1024, repeats: int = 7) -> float:
    """Multiply-adds a second of a float32 matrix product of `side`³, the better of XLA's and PyTorch's."""
    import jax
    import jax.numpy as jnp
    import torch

    x = jnp.ones((side, side), jnp.float32)
    y = torch.ones(side, side)
    product = jax.jit(jnp.matmul)
    best = []
    for run in (lambda: jax.block_until_ready(product(x, x)), lambda: y @ y):
        run()
        best.append(statistics.median(seconds(run) for _ in range(repeats)))
    return side**3 / min(best)


def memory(module: str, case: str, side: str, cores: int) -> float:
    """Peak memory (GiB) of a process that prepares one side of a case and runs it once."""
    command = [sys.executable, "-m", module, "--memory-of", side, "--case", case, "--cores", str(cores)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return float(done.stdout.split()[-1])


def peak_memory() -> float:
    """Of this process, GiB. Not `resource`'s: that starts with the peak of the process which started this one."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 2**20


HEADER = (
    "| work | PyTorch, s | ours, s | ratio (min–max) | wanted | compile, s | fraction of the limit: 1024³ / own shapes "
    "| memory, GiB: PyTorch / ours |\n"
    "|---|---|---|---|---|---|---|---|"
)


def row(result: Result) -> str:
    ratio = (
        f"{statistics.median(result.ratios):.2f} ({min(result.ratios):.2f}–{max(result.ratios):.2f})"
        if result.ratios
        else "–"
    )
    fractions = [f"{limit / result.ours:.2f}" if limit else "–" for limit in (result.limit, result.own_limit)]
    cells = (
        result.name,
        _short(result.peer),
        _short(result.ours),
        ratio,
        _short(result.least),
        f"{result.compile_seconds:.0f}",
        " / ".join(fractions),
        f"{_short(result.peer_memory)} / {_short(result.our_memory)}",
    )
    return f"| {' | '.join(cells)} |"


def _short(value: float | None) -> str:
    return f"{value:.3g}" if value is not None else "–"


def main(description: str | None, module: str, cases: Sequence[Case]) -> None:
    """The command of one benchmark: a table of its cases, optionally also as json lines."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=[case.name for case in cases], help="only this one")
    parser.add_argument("--cores", type=int, default=2, help="given to both (default: %(default)s)")
    parser.add_argument("--repeats", type=int, help="timed rounds (default: the case's own)")
    parser.add_argument("--json", type=Path, help="file to add the results to, one object a line")
    parser.add_argument("--memory-of", choices=("ours", "peer"), help="run one side once and print its peak, GiB")
    arguments = parser.parse_args()
    use_cores(arguments.cores)
    chosen = [case for case in cases if arguments.case in (None, case.name)]
    if arguments.memory_of:
        [case] = chosen
        side = case.ours().run if arguments.memory_of == "ours" or not case.peer else case.peer()
        side()
        print(peak_memory())
        return
    print(HEADER, flush=True)
    for case in chosen:
        result = compare(case, module, arguments.cores, arguments.repeats)
        print(row(result), flush=True)
        if arguments.json:
            with arguments.json.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(result)) + "\n")
