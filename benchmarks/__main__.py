"""All comparisons with PyTorch, then loader and evaluation, one after the other, into docs/benchmarks.md and its chart.

python -m benchmarks
python -m benchmarks --reuse    # only the page and the chart, from the results that are there
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

COMPARISONS = ("deformable_attention", "swin", "encoder", "detection", "training_step", "naming")
TABLES = ("loader", "evaluation")  # they print their own
PAGE, CHART = Path("docs/benchmarks.md"), Path("docs/benchmarks.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reuse", action="store_true", help="measure nothing: take what an earlier run left")
    parser.add_argument("--results", type=Path, default=Path("runs/benchmarks"), help="folder (default: %(default)s)")
    arguments = parser.parse_args()
    folder: Path = arguments.results
    file = folder / "comparisons.jsonl"
    if not arguments.reuse:
        measure(folder, file)
    results = [Result(**json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]
    heading = (folder / "heading.txt").read_text(encoding="utf-8")
    page = PAGE.read_text(encoding="utf-8")
    page = filled(page, "comparisons", "\n".join([heading, HEADER, *map(row, results)]))
    for name in TABLES:
        page = filled(page, name, (folder / f"{name}.md").read_text(encoding="utf-8").strip())
    PAGE.write_text(page, encoding="utf-8")
    draw(results)


def measure(folder: Path, file: Path) -> None:
    """Runs every benchmark, each in a process of its own: none inherits another's memory."""
    folder.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)
    (folder / "heading.txt").write_text(heading_of_run(), encoding="utf-8")
    for module in COMPARISONS:
        subprocess.run([sys.executable, "-m", f"benchmarks.{module}", "--json", str(file)], check=True)
    for module in TABLES:
        command = [sys.executable, "-m", f"benchmarks.{module}"]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        print(f"\n{module}\n\n{done.stdout}")
        (folder / f"{module}.md").write_text(done.stdout, encoding="utf-8")


def heading_of_run() -> str:
    """Machine, day, commit and versions."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    versions = ", ".join(f"{name} {version(name)}" for name in ("jax", "flax", "torch", "transformers"))
    return f"`make bench`, {machine()}, {date.today()}, commit {commit.stdout.strip()}; {versions}; float32.\n"


def filled(page: str, name: str, text: str) -> str:
    """The page with `text` between its marks of that name; the words around them stay."""
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->\n"
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"{PAGE} has no place for a table: {begin.strip()} … {end.strip()}")
    return f"{before}{begin}{text}\n{end}{after}"


def machine() -> str:
    cpuinfo = Path("/proc/cpuinfo")  # of Linux
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
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
