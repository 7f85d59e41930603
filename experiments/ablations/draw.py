"""Tables and pictures of the results that are there: `python -m experiments.ablations.draw`.

The tables go into docs/results.md, the pictures into experiments/ablations/.
"""

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.ablations.arms import ARMS, BASELINE, FULL, SEEDS
from experiments.ablations.paired import Comparison, compare
from experiments.ablations.protocol import (
    PAIRS,
    Claim,
    Result,
    controls,
    mechanisms,
    naming_level,
    orders,
    smallest_effect,
)
from experiments.ablations.run import HERE, RESULTS, TABLE, failed_runs, read_rows
from opendet_jax.files import replacing

ROOT = HERE.parents[1]
PAGE = ROOT / "docs" / "results.md"
PICTURES = {
    "differences.png": "Differences of paired runs, their means and intervals",
    "ap_over_steps.png": "AP over steps: the paper's figure 1",
    "alignment.png": "Alignment and similarity of names: figures 8 and 9",
}
BEGIN, END = "<!-- ablations -->\n", "<!-- /ablations -->\n"
COLOURS = {FULL: "#3b6ea5", BASELINE: "#d08a2e"}
Results = dict[str, dict[int, Result]]  # by arm and seed


def read_results(folder: Path) -> Results:
    found: Results = {}
    for arm in ARMS:
        files = {seed: folder / f"{arm}_{seed}.json" for seed in SEEDS}
        found[arm] = {s: json.loads(f.read_text(encoding="utf-8")) for s, f in files.items() if f.exists()}
    return found


def compared(claim: Claim, results: Results) -> Comparison | None:
    values = [
        {seed: value for seed, result in results[arm].items() if (value := claim.value(result)) is not None}
        for arm in (claim.first, claim.second)
    ]
    return compare(*values, claim.smallest, PAIRS)


def main() -> None:
    results = read_results(RESULTS)
    done = sum(map(len, results.values()))
    delta = smallest_effect(results[FULL])
    draw_claims((*orders(delta), *mechanisms(naming_level(results[FULL])), *controls(delta)), results)
    if results[FULL] or results[BASELINE]:
        draw_curves(results)
        draw_alignment(results)
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    if not rest:
        sys.exit(f"error: {PAGE} has no place for the tables, between {BEGIN.strip()} and {END.strip()}")
    shown = "\n\n".join(tables(results, done))
    PAGE.write_text(f"{before}{BEGIN}\n{shown}\n\n{END}{after}", encoding="utf-8")
    print(f"{done} of {len(ARMS) * PAIRS} runs in {PAGE.relative_to(ROOT)} and {HERE.relative_to(ROOT)}")


def tables(results: Results, done: int) -> list[str]:
    failed = failed_runs(read_rows(TABLE))
    failed -= {f"{arm}_{seed}" for arm, seeds in results.items() for seed in seeds}  # done, be it at a second try
    said = f"**{done} of {len(ARMS) * PAIRS} runs are done, {len(failed)} failed.**"
    partly = [f"`{arm}` {len(seeds)}" for arm, seeds in results.items() if 0 < len(seeds) < PAIRS]
    said += f" With some of their six seeds: {', '.join(partly)}." if partly else ""
    none = [f"`{arm}`" for arm, seeds in results.items() if not seeds]
    said += f" Not run yet: {', '.join(none)}." if none else ""
    if not done:
        return [said]
    delta = smallest_effect(results[FULL])
    parts = [
        said,
        noise(results, delta),
        arms_table(results),
        table("order: AP", orders(delta), results),
    ]
    parts += [
        f"![{title}](../{HERE.relative_to(ROOT)}/{name})" for name, title in PICTURES.items() if (HERE / name).exists()
    ]
    parts += [table("mechanism", mechanisms(naming_level(results[FULL])), results), opposing(results)]
    parts += [table("negative control", controls(delta), results), unchanged(results)]
    return [part for part in parts if part]


def noise(results: Results, delta: float) -> str:
    values = [100 * result["curve"][-1]["AP"] for result in results[FULL].values()]
    if len(values) < 2:
        return f"Noise: {len(values)} runs of `full` so far."
    spread = float(np.std(values, ddof=1))
    verdict = "below" if spread < 50 * delta else "**not below**"
    return (
        f"Noise: AP of `full` over {len(values)} seeds is {np.mean(values):.1f} ± {spread:.2f} (standard deviation), "
        f"{verdict} half of the smallest effect of interest, {100 * delta:.1f} AP."
    )


def arms_table(results: Results) -> str:
    names = ("AP", "AP50", "APr", "APu", "agnostic_AP")
    rows = [
        "| arm | runs | AP | AP50 | APr | AP of never-seen names | class-agnostic AP |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm, seeds in results.items():
        if not seeds:
            continue
        finals = [result["curve"][-1] for result in seeds.values()]
        cells = [_mean_and_spread([100 * final[name] for final in finals if name in final]) for name in names]
        rows.append(f"| `{arm}` {ARMS[arm].title} | {len(seeds)} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _mean_and_spread(values: Sequence[float]) -> str:
    if not values:
        return "–"
    return f"{np.mean(values):.1f}" + (f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else "")


def table(title: str, claims: Iterable[Claim], results: Results) -> str:
    rows = [f"| {title} | paper | here | 95 % interval | p | pairs | verdict |", "|---|---|---|---|---|---|---|"]
    for claim in claims:
        found = compared(claim, results)
        if found is None:
            rows.append(f"| {claim.title} | {claim.paper} | – | – | – | 0 | not run |")
            continue
        mean, low, high = (_shown(claim, value) for value in (found.mean, found.low, found.high))
        cells = [
            claim.title,
            claim.paper,
            mean,
            f"{low} to {high}",
            f"{found.p:.3f}",
            str(len(found.seeds)),
        ]
        rows.append(f"| {' | '.join(cells)} | {found.verdict} |")
    return "\n".join(rows)


def _shown(claim: Claim, value: float) -> str:
    scaled = claim.factor * value
    return f"{scaled:+.1f}" if claim.factor * claim.smallest >= 1 else f"{scaled:+.3f}"


def opposing(results: Results) -> str:
    """The masked alignment's mechanism, over the runs of the full method."""
    found = [r["opposing_gradients"] for r in results[FULL].values()]
    if not found:
        return ""
    rows = [
        "| masked alignment (A.3) | queries with another text of their object's name | opposing pairs, no mask "
        "| gradient cancelled, no mask | both with the mask |\n|---|---|---|---|---|"
    ]
    for mode, title in (("one_to_many", "one-to-many layers"), ("one_to_one", "one-to-one layers")):
        values = [
            [run[mode]["without_mask"][key] for run in found]
            for key in ("share_concerned", "opposing_pairs", "cancelled")
        ]
        masked = {run[mode]["with_mask"][key] for run in found for key in ("opposing_pairs", "cancelled")}
        cells = [_percent([value for value in column if value is not None]) for column in values]
        rows.append(f"| {title} | {' | '.join(cells)} | {_percent([v for v in masked if v is not None])} |")
    share = _percent([run["share_of_scenes"]["with_two_of_a_name"] for run in found])
    return "\n".join(rows) + f"\n\nOf scenes with two objects of one name, which are {share} of those in training."


def _percent(values: Sequence[float]) -> str:
    if not values:
        return "–"
    low, high = (f"{100 * value:.1f}" for value in (min(values), max(values)))
    return f"{low} %" if low == high else f"{low} to {high} %"


def unchanged(results: Results) -> str:
    if not any(results.values()):
        return ""
    changes = [result["aligner_removed_changes"] for seeds in results.values() for result in seeds.values()]
    return (
        f"The aligner removed at inference changed {sum(changes)} detections, in {sum(map(bool, changes))} of "
        f"{len(changes)} runs."
    )


def draw_claims(claims: Sequence[Claim], results: Results) -> None:
    """Every pair as a point, the interval of their mean as a line; each claim in units of its smallest effect."""
    pairs = [(claim, found) for claim in claims if (found := compared(claim, results))]
    if not pairs:
        return
    figure = Figure(figsize=(10, 0.6 * len(pairs) + 1.4), layout="constrained")
    axes = figure.subplots()
    axes.axvspan(-1, 1, color="#dddddd")
    axes.axvline(0, color="black", linewidth=0.8)
    for place, (claim, found) in enumerate(pairs):
        low, mean, high, *points = np.array([found.low, found.mean, found.high, *found.differences]) / claim.smallest
        axes.plot([low, high], [place, place], color="#c0504d", linewidth=2)
        axes.plot(mean, place, "|", color="#c0504d", markersize=16)
        axes.plot(points, [place + 0.2] * len(points), "o", color="#3b6ea5", markersize=4)
    names = [f"{claim.title}\n{found.verdict}, mean {_shown(claim, found.mean)}" for claim, found in pairs]
    axes.set_yticks(range(len(pairs)), names, fontsize=8)
    axes.set_ylim(len(pairs) - 0.4, -0.6)
    axes.set_xlabel(
        "difference in smallest effects of interest (grey: ± 1); points: pairs of runs, lines: 95 % intervals"
    )
    _save(figure, "differences.png")


def draw_curves(results: Results) -> None:
    """The paper's figure 1: AP over steps, a line a seed, and the mean with a band of one standard deviation."""
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    whole, never = figure.subplots(1, 2)
    for axes, metric, title in ((whole, "AP", "AP"), (never, "APu", "AP of never-seen names")):
        for arm in (FULL, BASELINE):
            _curves(axes, arm, results[arm], metric)
        axes.set(xlabel="step", ylabel=title)
    whole.legend(fontsize=8)
    _save(figure, "ap_over_steps.png")


def _curves(axes: Axes, arm: str, seeds: dict[int, Result], metric: str) -> None:
    if not seeds:
        return
    steps = [point["step"] for point in next(iter(seeds.values()))["curve"]]
    values = 100 * np.array([[point[metric] for point in result["curve"]] for result in seeds.values()])
    axes.plot(steps, values.T, color=COLOURS[arm], linewidth=0.6, alpha=0.7)
    mean, spread = values.mean(0), values.std(0, ddof=1) if len(values) > 1 else np.zeros(len(steps))
    label = f"{ARMS[arm].title}, {len(values)} seed{'s' * (len(values) != 1)}"
    axes.plot(steps, mean, "o-", color=COLOURS[arm], label=label)
    axes.fill_between(steps, mean - spread, mean + spread, color=COLOURS[arm], alpha=0.2, linewidth=0)


def draw_alignment(results: Results) -> None:
    """The paper's figures 8 and 9: of matched queries, alignment with the text and similarity of names."""
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for arm in (FULL, BASELINE):
        seeds = results[arm]
        if not seeds:
            continue
        cosine, similarity = (
            np.concatenate([result["objects"][name] for result in seeds.values()]) for name in ("cosine", "similarity")
        )
        label = f"{ARMS[arm].title}: "
        for axes, values in ((left, cosine), (middle, similarity)):
            said = f"{label}{values.mean():.3f} ± {values.std():.3f}"
            axes.hist(values, 60, density=True, histtype="step", color=COLOURS[arm], label=said)
        chosen = np.random.default_rng(0).permutation(len(cosine))[:1500]
        right.scatter(cosine[chosen], similarity[chosen], s=3, alpha=0.4, color=COLOURS[arm], linewidths=0)
    left.set(xlabel="cosine of query and text", ylabel="density", title="alignment (figure 8)")
    middle.set(xlabel="cosine of generated and true name", yscale="log", title="similarity of names")
    right.set(xlabel="alignment", ylabel="similarity of names", title="both (figure 9)")
    for axes in (left, middle):
        axes.legend(fontsize=7)
    _save(figure, "alignment.png")


def _save(figure: Figure, name: str) -> None:
    with replacing(HERE / name) as part:
        figure.savefig(part, dpi=110, format="png")


if __name__ == "__main__":
    main()
