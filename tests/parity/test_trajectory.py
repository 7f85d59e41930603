"""Training beside the authors' program: many steps of ours from its weights, on its batches, with its random numbers.

The program ran in float64 and in float32, and the distance of the two grows from step to step, as rounding does in any
training. Ours may be three times as far from the float64 run as their own float32 run has been until then (one run is
one draw of a random distance), and never has to be nearer than float32 can be expected in a single step.

In float64 ours may be a thousandth of that away: what is left is rounding alone, so that the two are the same program.
Training from these weights is chaotic, rounding doubles with every step: from the step in which their float32 run has
lost the course, by a hundredth in the median term, float64 is asked for no more than float32.

Until the step in which the program's own two runs decide differently, ours decides as the float64 run. Which decision
parts first, and when, is chance: from that step on the band is at least that of the step in which both kinds, selected
tokens and matched pairs, have parted. A loss term may then also be off by the share of one object: the alignment loss
leaves out pairs that overlap by less than 0.05, a decision that the files do not hold.
"""

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from tests.parity import report
from tests.parity.step import program_terms, stored_terms
from tests.parity.trajectory import SETS, runs
from tests.parity.vectors import Vectors

SLACK = 3  # of the distance of the program's own float32 run
SHARE, FLOOR = 1e-3, 1e-8  # of that, and relative, what is asked of float64
LOST = 1e-2  # in the median term, of the program's own float32 run
FIRST = 2  # steps of each run that the fast test takes
# Of a single step, relative: what can be asked of float32.
FLOORS = {"worst loss term": 1e-5, "median loss term": 1e-5, "total loss": 1e-5, "gradient norm": 2e-4}
DECISIONS = "selected tokens", "matched pairs"
KINDS = ("alignment", "objectness", "l1", "giou", "distillation", "naming", "text_denoising")

Pair = tuple[str, int, int, int]  # set, image, token, object


@dataclass
class Course:
    """A run, step by step; `parameters` after the recorded steps alone."""

    terms: dict[str, np.ndarray]  # T each
    total: np.ndarray  # T
    gradient_norm: np.ndarray  # T
    tokens: list[set[tuple[int, int]]]  # (image, token)
    pairs: list[set[Pair]]
    parameters: dict[int, dict[str, np.ndarray]]

    def __len__(self) -> int:
        return len(self.total)


def stored_course(vectors: Vectors, run: str, kind: str) -> Course:
    """The program's, in float64 ("f64") or float32 ("f32")."""
    own = vectors.within(f"{run}/{kind}/")
    tokens, pairs = [], []
    for step, count in enumerate(own["select/queries"]):
        index = own["select/index"][step]
        tokens.append({(image, int(token)) for image in range(len(index)) for token in index[image, :count]})
        pairs.append(
            {
                (of, image, int(index[image, query]), int(what))
                for names in SETS.values()
                for of in names
                for image in range(len(index))
                for query, what in own[f"match/{of}"][step, image]
                if query >= 0
            }
        )
    recorded = {
        int(step): {key: own[f"params/{key}"][place] for key in ("norm", "change", "sample")}
        | {f"of/{name}": own[f"params/of/{name}"][place] for name in own.cases("params/of/")}
        for place, step in enumerate(own["params/steps"])
    }
    return Course(
        terms=stored_terms(vectors["loss/names"], own["loss/unweighted"].T),
        total=own["loss/total"],
        gradient_norm=own["grad/global_norm"],
        tokens=tokens,
        pairs=pairs,
        parameters=recorded,
    )


def our_course(found: Mapping[str, np.ndarray], run: str, steps: int) -> Course:
    """From what `tests.parity.trajectory` wrote."""

    def over_steps(name: str) -> np.ndarray:
        return np.array([found[f"{run}/{step}/{name}"] for step in range(1, steps + 1)])

    scalars = [key for key, x in found.items() if key.startswith(f"{run}/1/") and x.ndim == 0]
    terms = {key.removeprefix(f"{run}/1/"): over_steps(key.removeprefix(f"{run}/1/")) for key in scalars}
    losses = ("l1/", "giou/", "alignment/", "joint/", "focal/", "distillation/", "naming", "text_denoising")
    tokens, pairs = [], []
    for index, valid, *of in zip(
        over_steps("index"),
        over_steps("valid"),
        *(over_steps(f"match/{name}") for names in SETS.values() for name in names),
        strict=True,
    ):
        tokens.append({(int(image), int(index[image, place])) for image, place in np.argwhere(valid)})
        names = [name for names in SETS.values() for name in names]
        pairs.append(
            {
                (name, int(image), int(index[image, query]), int(objects[image, query]))
                for name, objects in zip(names, of, strict=True)
                for image, query in np.argwhere(objects >= 0)
            }
        )
    recorded = {}
    for step in range(1, steps + 1):
        start = f"{run}/{step}/after/"
        after = {key.removeprefix(start): x for key, x in found.items() if key.startswith(start)}
        recorded |= {step: after} if after else {}
    return Course(
        terms=program_terms({name: x for name, x in terms.items() if name.startswith(losses)}),
        total=terms["total"],
        gradient_norm=terms["gradient_norm"],
        tokens=tokens,
        pairs=pairs,
        parameters=recorded,
    )


def take(
    vectors: Vectors, steps: dict[str, int], out: Path, *options: object, float64: bool = False
) -> dict[str, Course]:
    """Our steps of each run, in a process of their own and with all of the compiler's optimisations."""
    modules = ["tests.parity.float64"] * float64 + ["tests.parity.trajectory"]
    command = [sys.executable, "-m", *modules, vectors.path, out, *options]
    counts = [f"{run}:{count}" for run, count in steps.items()]
    environment = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
    subprocess.run([*command, *counts], check=True, env=environment)
    found = dict(np.load(out))
    return {run: our_course(found, run, count) for run, count in steps.items()}


def distances(got: Course, want: Course) -> dict[str, np.ndarray]:
    """Of every step that both have; relative, or how many tokens and pairs differ."""
    steps = min(len(got), len(want))
    assert got.terms.keys() == want.terms.keys()
    terms = np.array([got.terms[name][:steps] / want.terms[name][:steps] - 1 for name in want.terms])
    both = list(zip(got.tokens, want.tokens, strict=False))
    return {
        "worst loss term": np.abs(terms).max(0),
        "median loss term": np.median(np.abs(terms), axis=0),
        "total loss": np.abs(got.total[:steps] / want.total[:steps] - 1),
        "gradient norm": np.abs(got.gradient_norm[:steps] / want.gradient_norm[:steps] - 1),
        "selected tokens": np.array([max(len(a - b), len(b - a)) for a, b in both]),
        "matched pairs": np.array([max(len(a - b), len(b - a)) for a, b in zip(got.pairs, want.pairs, strict=False)]),
    }


def parameter_distances(got: Course, want: Course) -> dict[str, np.ndarray]:
    """Of every recorded step that both have; relative. Norms are those of the tensors that move more than the median
    one: of a few numbers that hardly move there is little to say."""
    rows = []
    for step in sorted(got.parameters.keys() & want.parameters.keys()):
        ours, theirs = got.parameters[step], want.parameters[step]
        large = theirs["change"] > np.median(theirs["change"])
        rows.append(
            {
                "norms of the parameters": np.abs(ours["norm"] / theirs["norm"] - 1)[large].max(),
                "norms of their changes": np.abs(ours["change"] / theirs["change"] - 1)[large].max(),
                "changes, sampled": apart(ours["sample"], theirs["sample"]),
                "changes, whole tensors": max(apart(ours[key], theirs[key]) for key in theirs if key.startswith("of/")),
            }
        )
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def apart(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def first_parted(control: Mapping[str, np.ndarray]) -> tuple[int, int]:
    """The steps, counted from 0, from which on tokens or pairs, and both, have parted; of one that never parts, the
    other's."""
    parted = [int(np.argmax(control[what] > 0)) for what in DECISIONS if (control[what] > 0).any()]
    return (min(parted), max(parted)) if parted else (len(control["total loss"]),) * 2


def limits(name: str, control: Mapping[str, np.ndarray], objects: np.ndarray) -> np.ndarray:
    """Of the distances `name`, step by step. `objects`: how many the batch of each step has."""
    steps = len(control[name])
    first, both = first_parted(control)
    reached = np.maximum.accumulate(control[name])
    reached[first:both] = reached[min(both, steps - 1)]
    limit = np.maximum(SLACK * reached, FLOORS.get(name, 0.0))
    if name == "worst loss term":
        limit[first:] = np.maximum(limit, 1 / objects)[first:]
    return limit


def objects_of(vectors: Vectors, steps: int) -> np.ndarray:
    batches = vectors.cases("batch_")
    counts = [vectors[f"batch_{batch}/objects/count"].sum() for batch in batches]
    return np.array([counts[step % len(batches)] for step in range(steps)])


def assert_within(vectors: Vectors, run: str, ours: Course, float64: bool = False) -> None:
    """All steps and all recorded parameters of a run of ours that the program's float32 run has, too."""
    want, control = stored_course(vectors, run, "f64"), stored_course(vectors, run, "f32")
    shared, theirs = distances(ours, want), distances(control, want)
    for what, name in zip(("selection", "matching"), DECISIONS, strict=True):
        parted = np.flatnonzero(theirs[name])
        assert int(vectors[f"{run}/parted/{what}"]) == (parted[0] + 1 if len(parted) else 0), f"{run}: the file differs"
    steps = np.arange(1, 1 + min(len(shared["total loss"]), len(theirs["total loss"])))
    objects = objects_of(vectors, len(theirs["total loss"]))
    compared = {name: (steps, got[: len(steps)], limits(name, theirs, objects)) for name, got in shared.items()}
    recorded, allowed = parameter_distances(ours, want), parameter_distances(control, want)
    kept = np.array(sorted(ours.parameters.keys() & want.parameters.keys() & control.parameters.keys()))
    for name, got in recorded.items():
        compared[name] = kept, got[: len(kept)], SLACK * np.maximum.accumulate(allowed[name])
    lost = np.append(np.flatnonzero(theirs["median loss term"] > LOST) + 1, np.inf)[0]
    outside = []
    for name, (numbers, got, limit) in compared.items():
        limit = limit[: len(numbers)]
        if float64:
            share = 0.0 if name in DECISIONS else np.maximum(SHARE * limit, FLOOR)
            limit = np.where(numbers < lost, share, limit)
        enter(name, f"{vectors.name} {run}, {len(steps)} steps{' in float64' * float64}", got, limit)
        outside += [
            f"{name}, step {numbers[i]}: {got[i]:.2e} > {limit[i]:.2e}" for i in np.flatnonzero(~(got <= limit))
        ]
    assert not outside, "\n".join([run, *outside])


def enter(name: str, reference: str, got: np.ndarray, limit: np.ndarray) -> None:
    """The report's row: of the step that comes nearest to its limit."""
    worst = int(np.argmax(got / np.where(limit > 0, limit, 1)))
    distance, allowed = float(got[worst]), float(limit[worst])
    report.enter_error(f"training, {name}", reference, distance, distance, allowed, name not in DECISIONS)


@pytest.mark.slow
@pytest.mark.minutes  # nearly all of them to compile
@pytest.mark.needs("meta/denoising")
def test_first_steps(trajectory_vectors, tmp_path):
    """In float64, where no kink decides."""
    steps = dict.fromkeys(runs(trajectory_vectors), FIRST)
    for run, course in take(trajectory_vectors, steps, tmp_path / "found.npz", float64=True).items():
        assert_within(trajectory_vectors, run, course, float64=True)


@pytest.mark.slow
@pytest.mark.needs("meta/denoising")
def test_all_steps(trajectory_vectors, tmp_path, request):
    """In float64, and in float32 with the sides of kinks that float64 takes."""
    vectors, pictures = trajectory_vectors, request.config.getoption("--trajectory-pictures")
    steps = {run: len(vectors[f"{run}/f64/loss/total"]) for run in runs(vectors)}
    exact = take(vectors, steps, tmp_path / "float64.npz", "--kinks", float64=True)
    rounded = take(vectors, steps, tmp_path / "float32.npz", "--sides", tmp_path / "float64.npz")
    if pictures:
        draw(vectors, exact, rounded, Path(pictures, f"{vectors.name}.png"))
    for run in steps:
        assert_within(vectors, run, exact[run], float64=True)
        assert_within(vectors, run, rounded[run])


def draw(vectors: Vectors, exact: dict[str, Course], rounded: dict[str, Course], path: Path) -> None:
    """For every run two columns: the losses, and how far each is from the program's float64 run."""
    names = runs(vectors)
    figure = Figure(figsize=(5 * 2 * len(names), 2.4 * (1 + len(KINDS))), layout="constrained")
    axes = figure.subplots(1 + len(KINDS), 2 * len(names))
    for column, run in enumerate(names):
        want, control = (stored_course(vectors, run, kind) for kind in ("f64", "f32"))
        shown = {
            "theirs, float64": (want, {"color": "black", "lw": 3, "alpha": 0.35}),
            "theirs, float32": (control, {"color": "tab:orange", "lw": 1.2}),
            "ours, float32": (rounded[run], {"color": "tab:blue", "lw": 1.2}),
            "ours, float64": (exact[run], {"color": "tab:green", "lw": 1.2, "ls": "--"}),
        }
        for row, kind in enumerate(("total", *KINDS)):
            curve, distance = axes[row, 2 * column : 2 * column + 2]
            for label, (course, style) in shown.items():
                steps = min(len(course), len(want))
                x, values, wanted = np.arange(1, steps + 1), of_kind(course, kind), of_kind(want, kind)
                curve.plot(x, values.sum(0)[:steps], label=label, **style)
                if course is want:
                    continue
                off = np.abs(values[:, :steps] / wanted[:, :steps] - 1)
                distance.plot(x, off.T, color=style["color"], lw=0.4, alpha=0.3)
                distance.plot(x, off.max(0), **style)
            curve.set_title(f"{run}: {kind.replace('_', ' ')}", fontsize=10)
            terms = f", each of {len(wanted)} and the worst" if len(wanted) > 1 else ""
            distance.set_title(f"relative distance from theirs in float64{terms}", fontsize=9)
            for axis in (curve, distance):
                axis.set_yscale("log")
                axis.grid(alpha=0.3)
                axis.set_xlabel("step", fontsize=8)
                axis.axvline(parted(vectors, run) or np.nan, color="grey", ls=":", lw=1)
    axes[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=80)


def of_kind(course: Course, kind: str) -> np.ndarray:
    """Terms, by name, × steps."""
    if kind == "total":
        return course.total[None]
    return np.array([x for name, x in sorted(course.terms.items()) if name.split("/")[0] == kind])


def parted(vectors: Vectors, run: str) -> int:
    """The first step in which the program's two runs decide differently; 0: none."""
    steps = [int(vectors[f"{run}/parted/{what}"]) for what in ("selection", "matching")]
    return min((step for step in steps if step), default=0)
