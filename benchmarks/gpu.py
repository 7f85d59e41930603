"""The GPU's page: are the kernels right, how fast are they, and how fast are training, detection and naming with them?

    python -m benchmarks.gpu --minutes 8

Four parts, each in a process of its own and with its own share of the time; what a part leaves goes to those behind it.
A part that is cut off leaves the rows that it has, and the page is written anew after each: gpu.md in docs, on a GPU.
Elsewhere (--tiny, on a CPU) it goes to runs/gpu.md. Compiled programs are kept, so that another run gets further.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.__main__ import machine

PAGE, ELSEWHERE = Path("docs") / "gpu.md", Path("runs/gpu.md")


@dataclass(frozen=True)
class Part:
    name: str  # as benchmarks/gpu_parts.py has it
    title: str
    words: str  # what the table shows
    share: float  # of the time


PARTS = (
    Part(
        "kernels",
        "Deformable attention: right?",
        "The largest error of each result against the definition in float64, over the result's largest number, for one "
        "image with 8 heads of width 32; and the kernels in the program, without which XLA's form was tried instead.",
        0.15,
    ),
    Part(
        "times",
        "Deformable attention: how fast?",
        "Milliseconds a call, medians of 7 rounds of 20 calls that are queued without waiting. The floor is the longer "
        "of moving every array once and of the operations, at the rates that the maker states. The clock is the "
        "host's, read when a round is done: JAX gives no events of the device's own.",
        0.2,
    ),
    Part(
        "training",
        "Training",
        "The step of `configs/swin_t.py` in bfloat16: forward, matching, losses, backward, AdamW. The floor: its "
        "matrix products and convolutions at the bfloat16 rate that the maker states. Memory as the compiler plans it, "
        "and the most that the device has held since the part began.",
        0.4,
    ),
    Part(
        "inference",
        "Detection and naming",
        "`configs/swin_t.py` in bfloat16 with random weights, copies to and from the host included; images or named "
        "boxes a second. Random names rarely end early: a trained model's take a fraction of the tokens.",
        0.25,
    ),
)


@dataclass
class Outcome:
    part: Part
    rows: list[dict[str, Any]] = field(default_factory=list)
    note: str = ""  # what became of it, where it did not end by itself


def measure(part: Part, limit: float, tiny: bool) -> tuple[dict[str, Any], Outcome]:
    """The device, and the rows that the part has found after at most `limit` seconds."""
    command = [sys.executable, "-m", "benchmarks.gpu_parts", part.name, *(["--tiny"] if tiny else [])]
    outcome = Outcome(part)
    with tempfile.TemporaryFile("w+", encoding="utf-8") as found, tempfile.TemporaryFile("w+") as errors:
        try:
            done = subprocess.run(command, stdout=found, stderr=errors, timeout=limit, check=False)
        except subprocess.TimeoutExpired:
            outcome.note = f"Cut off after {limit:.0f} s."
        else:
            if done.returncode:
                errors.seek(0)
                last = errors.read().strip().splitlines()[-1:]
                outcome.note = f"Ended with an error (status {done.returncode}): `{''.join(last)[:300]}`"
        found.seek(0)
        lines = [line for line in found if line.endswith("\n")]  # of a line that was cut off nothing is known
    device, *outcome.rows = map(json.loads, lines) if lines else [{}]
    return device, outcome


def table(rows: list[dict[str, Any]]) -> str:
    head = list(rows[0])
    lines = [head, ["---"] * len(head), *([row[name] for name in head] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def page(heading: str, outcomes: list[Outcome]) -> str:
    parts = [f"# On a GPU\n\n{heading}\n"]
    for outcome in outcomes:
        body = table(outcome.rows) if outcome.rows else "No row was found."
        parts.append(f"## {outcome.part.title}\n\n{outcome.part.words}\n\n{body}\n")
        if outcome.note:
            parts.append(f"{outcome.note}\n")
    return "\n".join(parts)


def heading(device: dict[str, Any], minutes: float) -> str:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    known = commit.stdout.strip() or "unknown"  # where only the files were copied
    return (
        f"`python -m benchmarks.gpu --minutes {minutes:g}`, {device['device']} with {machine()}, {date.today()}, "
        f"commit {known}; jax {device['jax']}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="for all parts together (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="sizes that run on a CPU in a minute, to try the script")
    parser.add_argument("--out", type=Path, help=f"the page (default: {PAGE} on a GPU, else {ELSEWHERE})")
    arguments = parser.parse_args()
    end, outcomes, device = time.monotonic() + 60 * arguments.minutes, [], {}
    for place, part in enumerate(PARTS):
        share = part.share / sum(later.share for later in PARTS[place:])
        found, outcome = measure(part, max(0.0, share * (end - time.monotonic())), arguments.tiny)
        device = device or found
        if device and device["platform"] != "gpu" and not arguments.tiny:
            sys.exit(f"no GPU: jax finds {device['device']}; --tiny tries the script without one")
        outcomes.append(outcome)
        print(f"{part.title} {len(outcome.rows)} rows. {outcome.note}".rstrip(), flush=True)
        if device:
            out = arguments.out or (PAGE if device["platform"] == "gpu" and not arguments.tiny else ELSEWHERE)
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(page(heading(device, arguments.minutes), outcomes), encoding="utf-8")
    if not device:
        sys.exit("no part had the time to find its device: give more minutes")


if __name__ == "__main__":
    main()
