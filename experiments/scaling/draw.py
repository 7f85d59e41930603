"""The table and the picture of docs/scaling.md from the points of run.py: `python -m experiments.scaling.draw`."""

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from experiments.scaling.run import FOLDER, POINTS

PAGE, PICTURE = Path("docs/scaling.md"), Path("docs/scaling.png")
BEGIN, END = "<!-- table -->\n", "<!-- /table -->\n"
GIB = 2**30
HEADER = (
    "| config | machine | mesh | images a share | peak memory, GiB (of) | parameters + optimizer, GiB "
    "| bound of a step, ms | bound an image, ms | limited by | communication | compile, s |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|"
)

LARGEST = (
    "| config | machine | mesh | images a share compiled, and whether they fit | largest that fits, by the last two "
    "| an image more, GiB |\n|---|---|---|---|---|---|"
)


def main() -> None:
    files = [FOLDER / f"{point.name}.json" for point in POINTS]
    found = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()]
    if not found:
        sys.exit(f"error: {FOLDER} holds no point; python -m experiments.scaling.run makes them")
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    table = "\n".join([HEADER, *map(row, found)])
    shown = f"{table}\n\n![Memory, bound and communication]({PICTURE.name})"
    if largest := largest_batches(found):
        shown += "\n\n" + "\n".join([LARGEST, *largest])
    PAGE.write_text(f"{before}{BEGIN}\n{shown}\n\n{END}{after}", encoding="utf-8")
    draw(found)
    print(f"{len(found)} of {len(POINTS)} points in {PAGE} and {PICTURE}")


def axes_of(point: dict[str, Any]) -> str:
    return " × ".join(f"{axis} {size}" for axis, size in point["mesh"].items() if size > 1) or "one device"


def row(point: dict[str, Any]) -> str:
    peak = point["memory"]["peak"]
    needs = "more" if peak is None else f"{peak / GIB:.1f}"
    memory = f"{needs} ({point['memory_limit'] / GIB:.0f})" + ("" if point["fits"] else ", **does not fit**")
    cells = [point["config"], point["topology"], axes_of(point), str(point["images_per_share"]), memory]
    if "bound" not in point:
        return f"| {' | '.join([*cells, *['–'] * 6])} |"
    low, stored = point["bound"], point["memory"]["parameters"] + point["memory"]["optimizer"]
    cells += [
        f"{stored / GIB:.2f}",
        f"{1e3 * low['step_seconds']:.0f}",
        f"{1e3 * low['image_seconds']:.2f}",
        low["limit"] + {"compiler": "", "trace": " \\*"}[point["flops_counted_by"]],
        f"{low['communication_share']:.0%}",
        f"{point['compile_seconds']:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def largest_batches(found: list[dict[str, Any]]) -> list[str]:
    """Of machines and meshes that have points with more than one number of images; by a line through the largest two,
    as memory grows faster the more there are."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for point in found:
        groups.setdefault((point["config"], point["topology"], axes_of(point)), []).append(point)
    rows = []
    for names, points in groups.items():
        points = sorted((p for p in points if p["memory"]["peak"] is not None), key=lambda p: p["images_per_share"])
        if len(points) < 2:
            continue
        (few, low), (many, high) = ((p["images_per_share"], p["memory"]["peak"] / GIB) for p in points[-2:])
        each = (high - low) / (many - few)
        most = int(many + (points[0]["memory_limit"] / GIB - high) / each)
        seen = ", ".join(f"{point['images_per_share']} {'fit' if point['fits'] else 'do not'}" for point in points)
        rows.append(f"| {' | '.join([*names, seen, str(most), f'{each:.2f}'])} |")
    return rows


def draw(found: list[dict[str, Any]]) -> None:
    """Over the points that were compiled: memory of a device, bound an image, share of communication."""
    whole = [point for point in found if "bound" in point]
    figure = Figure(figsize=(13, 0.34 * len(whole) + 1.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3, sharey=True)
    places = range(len(whole))
    colours = ["#3b6ea5" if point["config"] == "swin_t" else "#d08a2e" for point in whole]
    labels = [f"{p['config']}  {p['topology']}  {axes_of(p)}, images a share: {p['images_per_share']}" for p in whole]
    left.barh(places, [point["memory"]["peak"] / GIB for point in whole], color=colours)
    limits = [point["memory_limit"] / GIB for point in whole]
    left.scatter(limits, places, marker="|", s=120, color="#c0504d", zorder=3)
    left.set_xlabel("peak memory of a device, GiB (red: what it has)")
    middle.barh(places, [1e3 * point["bound"]["image_seconds"] for point in whole], color=colours)
    middle.set_xscale("log")
    middle.set_xlabel("lower bound of the time an image, ms")
    right.barh(places, [100 * point["bound"]["communication_share"] for point in whole], color=colours)
    right.set_xlabel("communication, % if nothing overlaps")
    left.set_yticks(places, labels, fontsize=8)
    left.invert_yaxis()
    figure.suptitle("Training step, compiled ahead of time and never run", fontsize=10)
    figure.savefig(PICTURE, dpi=120)


if __name__ == "__main__":
    main()
