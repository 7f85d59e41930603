"""Runs what is left of the protocol: `python -m experiments.ablations.run [RUN …]`.

One process, one run after the other in the order of arms.py. A run is an arm and a seed, `full_0` say; without names
all that have no result yet. Results lie in experiments/ablations/results/, one json each, and a row for every run that
ended, well or not, in experiments/ablations/runs.csv. The command can be stopped and repeated: a run that was cut off
goes on from its last evaluation. A run that failed is not tried again unless it is named.
"""

import argparse
import csv
import gc
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax

from experiments.ablations.arms import ARMS, PILOT_SEEDS, SEEDS, STEPS
from opendet_jax.errors import InputError
from opendet_jax.files import write_json
from opendet_jax.main import take_large_pages

HERE = Path(__file__).parent
RESULTS, TABLE = HERE / "results", HERE / "runs.csv"
COLUMNS = (
    *("kind", "arm", "seed", "outcome", "date", "commit", "steps", "minutes", "cpu_minutes", "load", "restarts"),
    *("AP", "AP50", "APr", "APc", "APf", "APu", "agnostic_AP", "recall50", "naming_accuracy"),
    *("query_text_cosine", "name_similarity", "score_iou_rank_correlation"),
    *("named_right_seen", "named_right_never_seen", "aligner_removed_changes"),
)


def queue(results: Path, table: Path) -> list[str]:
    """The protocol's runs that have neither a result nor a failure, in their order."""
    failed = failed_runs(read_rows(table))
    names = [f"{arm}_{seed}" for arm in ARMS for seed in SEEDS]
    return [name for name in names if name not in failed and not (results / f"{name}.json").exists()]


def failed_runs(rows: Iterable[dict[str, str]]) -> set[str]:
    """The protocol's runs that ended in a failure; a row that was cut off says nothing."""
    return {
        f"{row['arm']}_{row['seed']}"
        for row in rows
        if row["kind"] == "protocol" and (row["outcome"] or "").startswith("failed")
    }


def arm_and_seed(name: str) -> tuple[str, int]:
    """Raises InputError for what is no run: an arm that is not in the protocol, or a seed that is no number."""
    arm, _, seed = name.rpartition("_")
    if arm not in ARMS or not seed.isdigit():
        raise InputError(f"{name!r} is no run: an arm of {', '.join(ARMS)}, then _ and a seed")
    if int(seed) not in SEEDS and int(seed) not in PILOT_SEEDS:
        raise InputError(
            f"{name!r}: seeds of the protocol are {SEEDS[0]} to {SEEDS[-1]}, of pilots "
            f"{PILOT_SEEDS[0]} to {PILOT_SEEDS[-1]}"
        )
    return arm, int(seed)


def read_rows(table: Path) -> list[dict[str, str]]:
    if not table.is_file():
        return []
    with table.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def add_row(table: Path, row: dict[str, Any]) -> None:
    """At the end of the table, as the runs end. What a run does not have is empty."""
    is_new = not table.is_file()
    is_cut_off = not is_new and not table.read_bytes().endswith(b"\n")  # by a kill in the middle of a row
    with table.open("a", newline="", encoding="utf-8") as file:
        file.write("\n" * is_cut_off)
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow({name: f"{value:.4f}" if isinstance(value, float) else value for name, value in row.items()})


def row_of(result: dict[str, Any]) -> dict[str, Any]:
    return {**result["curve"][-1], **result, "outcome": "done"}


def commit() -> str:
    """Of the code, with a + where files that are part of it differ from it."""
    text = subprocess.run(["git", "rev-parse", "--short=7", "HEAD"], cwd=HERE, check=True, capture_output=True).stdout
    changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "*.py", "*.safetensors"], cwd=HERE.parents[1])
    return text.decode().strip() + "+" * (changed.returncode != 0)


def run_all(names: Iterable[str], workdir: Path) -> None:
    from experiments.ablations.trial import DivergedError, Programs, run

    version, programs = commit(), None
    for name in names:
        arm, seed = arm_and_seed(name)
        if programs is None or programs.arm.name != arm:
            programs = None
            gc.collect()
            jax.clear_caches()  # programs of an arm before this one, a gigabyte each
            programs = Programs(ARMS[arm])
        kind = "pilot" if seed in PILOT_SEEDS else "protocol"
        about = {"kind": kind, "arm": arm, "seed": seed, "commit": version, "steps": STEPS}
        about["date"] = time.strftime("%Y-%m-%d", time.gmtime())
        try:
            result = run(programs, seed, workdir / name, lambda text: print(text, flush=True))
        except DivergedError as error:
            add_row(TABLE, about | {"outcome": f"failed: {error}"})
            print(f"{name}: failed: {error}", flush=True)
            continue
        # What else the machine did: more than its cores means that minutes are of a shared machine.
        result = about | {"load": round(os.getloadavg()[2], 1), "cores": os.cpu_count()} | result
        write_json((workdir if kind == "pilot" else RESULTS) / f"{name}.json", result, indent=None)
        add_row(TABLE, row_of(result))
        print(f"{name}: done in {result['minutes']:.1f} minutes, CPU {result['cpu_minutes']:.1f}", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="an arm and a seed; default: all that have no result")
    parser.add_argument("--workdir", type=Path, default=Path("runs/ablations"), help="of scenes and unfinished runs")
    options = parser.parse_args(arguments)
    try:
        left = options.runs or queue(RESULTS, TABLE)
        for name in left:
            arm_and_seed(name)
        print(f"{len(left)} runs to do: {', '.join(left)}", flush=True)
        from opendet_jax.compilation import enable_cache

        enable_cache()
        run_all(left, options.workdir)
    except InputError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    take_large_pages()
    main()
