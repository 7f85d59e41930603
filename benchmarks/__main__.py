"""All comparisons with PyTorch, one after the other, into docs/benchmarks.md and its chart.

python -m benchmarks
python -m benchmarks --reuse runs/benchmarks.jsonl    # only the page and the chart, from results that are there
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path

from benchmarks.comparison import HEADER, Result, row

MODULES = ("deformable_attention", "swin", "encoder", "detection", "training_step", "naming")
PAGE, CHART = Path("docs/benchmarks.md"), Path("docs/benchmarks.png")
BEGIN, END = "<!-- table -->\n", "<!-- /table -->\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reuse", type=Path, help="results of an earlier run")
    parser.add_argument("--results", type=Path, default=Path("runs/benchmarks.jsonl"), help="default: %(default)s")
    arguments = parser.parse_args()
    file = arguments.reuse or arguments.results
    if not arguments.reuse:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.unlink(missing_ok=True)
        for module in MODULES:  # a process each: none inherits another's memory
            command = [sys.executable, "-m", f"benchmarks.{module}", "--json", str(file)]
            subprocess.run(command, check=True)
    results = [Result(**json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]
    write_page(results)
    draw(results)


def write_page(results: list[Result]) -> None:
    """The table takes its place in the page; the words around it stay."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    versions = ", ".join(f"{name} {version(name)}" for name in ("jax", "flax", "torch", "transformers"))
    origin = f"`make bench`, {machine()}, {date.today()}, commit {commit.stdout.strip()}; {versions}; float32.\n"
    table = "\n".join([HEADER, *map(row, results)])
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}{origin}\n{table}\n{END}{after}", encoding="utf-8")


def machine() -> str:
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return f"{len(names)} cores of {names[0]}" if names else platform.platform()


def draw(results: list[Result]) -> None:
    """Ratios as bars, the range of the rounds as a line, what was wanted as a mark."""
    from matplotlib.figure import Figure

    results = [result for result in results if result.ratios]
    figure = Figure(figsize=(11, 0.42 * len(results) + 1), layout="constrained")
    axes = figure.subplots()
    places = range(len(results))
    ratios = [statistics.median(result.ratios) for result in results]
    spread = [
        [ratio - min(result.ratios) for ratio, result in zip(ratios, results, strict=True)],
        [max(result.ratios) - ratio for ratio, result in zip(ratios, results, strict=True)],
    ]
    axes.barh(places, ratios, xerr=spread, color="#3b6ea5", ecolor="#222222", capsize=3, height=0.6)
    wanted = [(place, result.least) for place, result in zip(places, results, strict=True) if result.least]
    axes.scatter(
        [least for _, least in wanted], [place for place, _ in wanted], marker="|", s=400, color="#c0504d", zorder=3
    )
    axes.axvline(1.0, color="#888888", lw=1)
    axes.set_yticks(places, [result.name for result in results])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xticks([0.5, 1, 2, 4, 8, 16], ["0.5", "1", "2", "4", "8", "16"])
    axes.set_xlabel("PyTorch's time / ours; line: lowest and highest round, red: wanted")
    figure.savefig(CHART, dpi=120)


if __name__ == "__main__":
    main()
