"""Where the time of `Detector.detect` goes, one image at a time and in batches: milliseconds an image by part.

    python -m benchmarks.batch_parts

Drawn scenes of 320 pixels and the model that comes along, as in `benchmarks.batches`. The milliseconds are the
processor's, the least of the rounds; by part they are shared out as XLA's profiler saw the operations of the compiled
programs, in the mean of the rounds: so other work of the machine lengthens nothing. On one core, what is seen is the
work itself, and not how threads wait for each other; `--cores 2` tells how many of them have work. Multiply-adds are
those of the compiled programs, filling included.
"""

import argparse
import math
import os
import re
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from benchmarks.__main__ import heading_of_run

HOLDING = ("while", "call", "conditional")  # operations whose time is that of others
NAME = re.compile(r"^\s*(?:ROOT )?%?(\S+) = ")
SHAPE = re.compile(r"^\s*(?:ROOT )?%?(\S+) = [a-z]\w*\[([\d,]*)\]", re.MULTILINE)
HOST = "Python, on its own thread: fitting pictures, calling programs, reading results"


@dataclass
class Part:
    """Of one image."""

    seconds: float = 0.0
    products: float = 0.0  # seconds of the operations that hold matrix products or convolutions
    multiply_adds: float = 0.0

    def add(self, seconds: float, multiply_adds: float) -> None:
        self.seconds += seconds
        self.products += seconds if multiply_adds else 0.0
        self.multiply_adds += multiply_adds


def multiply_adds(program: str) -> dict[str, float]:
    """From the text of a compiled program: those of each instruction and of what it is fused with."""
    of_computation: dict[str, float] = {}
    found: dict[str, float] = {}
    for computation in re.split(r"^}\n", program, flags=re.MULTILINE):
        shapes = {name: _numbers(shape) for name, shape in SHAPE.findall(computation)}
        inside = 0.0
        for line in computation.splitlines():
            if (match := NAME.match(line)) is None:
                continue
            own = _product(line, shapes, match[1])
            if (called := re.search(r"calls=%?([\w.-]+)", line)) is not None:
                own += of_computation.get(called[1], 0.0)
            found[match[1]] = own
            inside += own
        if (head := re.search(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$", computation, re.MULTILINE)) is not None:
            of_computation[head[1]] = inside
    return found


def _product(line: str, shapes: Mapping[str, tuple[int, ...]], name: str) -> float:
    match = re.search(r" (dot|convolution)\(%?([\w.-]+), %?([\w.-]+)\)", line)
    if match is None:
        return 0.0
    kind, lhs, rhs = match[1], shapes[match[2]], shapes[match[3]]
    if kind == "dot":
        contracting = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", line)
        each = math.prod(lhs[axis] for axis in _numbers(contracting[1] if contracting else ""))
    else:
        labels = re.search(r"dim_labels=\w+_(\w+)->", line)
        assert labels is not None, line
        each = math.prod(rhs) / rhs[labels[1].index("o")]
    return float(math.prod(shapes[name]) * each)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(",") if number)


@dataclass
class Way:
    """Images one by one, or in batches."""

    parts: dict[str, Part]
    cpu_seconds: float  # of an image, the least
    threads: float  # that run or could run, on average

    @property
    def whole(self) -> Part:
        total = Part()
        for part in self.parts.values():
            total = Part(*map(sum, zip(astuple(total), astuple(part), strict=True)))
        return total


class Programs:
    """The compiled programs that a detector runs, by the names that the profiler gives them."""

    def __init__(self, inference: Any):
        self.texts: dict[str, str] = {}
        for name in ("_encode", "_decode_queries", "_generate"):
            setattr(inference, name, self._noting(getattr(inference, name)))

    def _noting(self, program: Any) -> Any:
        def call(*arguments: Any, **settings: Any) -> Any:
            text = program.lower(*arguments, **settings).compile().as_text()
            name = text.partition(",")[0].removeprefix("HloModule ")
            assert self.texts.setdefault(name, text) == text, f"two sizes of {name}, which a profile cannot tell apart"
            return program(*arguments, **settings)

        return call


def measured(size: int, images: int, batch_size: int, rounds: int) -> Way:
    """By part; the first that imports jax."""
    from benchmarks.batches import detector_of
    from benchmarks.parts import named_operations, own_durations, part_of, traced
    from opendet_jax.data.scene_drawing import draw_scene

    scenes = [draw_scene(seed=5, split="val", index=index, size=size)[0] for index in range(images)]
    noting = detector_of(size)
    programs = Programs(noting._inference)
    noting.detect(scenes, batch_size=batch_size)
    detector = detector_of(size)
    detector.detect(scenes, batch_size=batch_size)
    host: list[float] = []
    cpu: list[float] = []
    threads: list[float] = []

    def run() -> None:
        detector.detect(scenes, batch_size=batch_size)

    for _ in range(rounds):
        before = time.thread_time(), time.process_time(), ready(), time.perf_counter()
        run()
        after = time.thread_time(), time.process_time(), ready(), time.perf_counter()
        own, all_of_them, ready_for, passed = (b - a for a, b in zip(before, after, strict=True))
        host.append(own)
        cpu.append(all_of_them)
        threads.append(ready_for / passed)

    spent: Counter[tuple[str, str]] = Counter()
    times: Counter[tuple[str, str]] = Counter()
    for _ in range(rounds):
        for event, seconds in own_durations(traced(run)):
            arguments = event.get("args", {})
            if "hlo_op" in arguments and not arguments["hlo_op"].startswith(HOLDING):
                operation = arguments["hlo_module"], arguments["hlo_op"]
                spent[operation] += seconds
                times[operation] += 1

    parts: dict[str, Part] = defaultdict(Part)
    parts[HOST].seconds = min(host) / images
    per_second = (min(cpu) - min(host)) / spent.total()  # CPU seconds, of one of the profile
    names = {module: named_operations(text) for module, text in programs.texts.items()}
    work = {module: multiply_adds(text) for module, text in programs.texts.items()}
    for (module, operation), seconds in spent.items():
        of_each = work[module].get(operation, 0.0) * times[module, operation] / (rounds * images)
        parts[part_of(names[module].get(operation, ""))].add(seconds * per_second / images, of_each)
    return Way(dict(parts), min(cpu) / images, statistics.median(threads))


def ready() -> float:
    """Seconds in which the threads of this process ran, or waited for a core, as Linux counts them; all together."""
    spent = 0
    for file in Path("/proc/self/task").glob("*/schedstat"):
        running, waiting, _ = file.read_text().split()
        spent += int(running) + int(waiting)
    return spent / 1e9


def rate_of_a_product(side: int = 1024, repeats: int = 15) -> float:
    """Multiply-adds a CPU second of one large product."""
    import jax
    import jax.numpy as jnp

    x = jnp.ones((side, side))
    run = jax.jit(jnp.matmul)
    seconds = []
    for _ in range(1 + repeats):
        start = time.process_time()
        jax.block_until_ready(run(x, x))
        seconds.append(time.process_time() - start)
    return side**3 / min(seconds)


def table(ways: Mapping[str, Way]) -> str:
    titles = "".join(f" {way}: CPU ms an image | share | products, billions a CPU second |" for way in ways)
    rows = [f"| part |{titles}", "|---|" + 3 * len(ways) * "---|"]
    first = next(iter(ways.values())).parts
    for name in sorted(first, key=lambda name: -first[name].seconds):
        rows.append(f"| {name} |" + "".join(_cells(way.parts[name], way.whole) for way in ways.values()))
    rows.append("| all |" + "".join(_cells(way.whole, way.whole) for way in ways.values()))
    return "\n".join(rows)


def _cells(part: Part, total: Part) -> str:
    rate = f"{part.multiply_adds / part.products / 1e9:.0f}" if part.products else "–"
    return f" {1e3 * part.seconds:.2f} | {part.seconds / total.seconds:.0%} | {rate} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=320, help="of the scenes, pixels (default: %(default)s)")
    parser.add_argument("--images", type=int, default=16, help="drawn scenes (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=11, help="(default: %(default)s)")
    parser.add_argument("--cores", type=int, default=1, help="(default: %(default)s)")
    options = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])  # before jax starts its threads
    sizes = {"one by one": 1, f"batches of {options.batch_size}": options.batch_size}
    ways = {way: measured(options.size, options.images, size, options.rounds) for way, size in sizes.items()}
    print(heading_of_run().replace("make bench", "python -m benchmarks.batch_parts"))
    print(f"{options.images} scenes of {options.size} pixels, {options.rounds} rounds, cores: {options.cores}\n")
    print(table(ways))
    print(f"\na product of 1024 × 1024 numbers: {rate_of_a_product() / 1e9:.0f} billion multiply-adds a CPU second")
    for name, way in ways.items():
        print(f"{name}: {way.whole.multiply_adds / 1e9:.2f} billion multiply-adds an image,", end=" ")
        print(f"{1e3 * way.cpu_seconds:.1f} CPU ms, {way.threads:.2f} threads that run or could run")


if __name__ == "__main__":
    main()
