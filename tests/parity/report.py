"""The parity report: what was compared, with what, and how far apart it was. Tests fill it; their end writes it."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROWS = "OPENDET_PARITY_ROWS"  # file of json lines that all processes of a test run append to

STEPS = "training, "  # stages of test_trajectory.py, which takes minutes

# Every rung of the ladder, lowest first. A rung that no test enters makes a full run fail.
STAGES = (
    "deformable attention, op",
    "deformable attention, op gradients",
    "deformable attention, module",
    "deformable attention, module gradients",
    "sine positions",
    "box operations",
    "NMS kept",
    "Swin relative positions",
    "T5 relative buckets",
    "proposals",
    "token selection (program)",
    "token selection (paper)",
    "normalised input",
    "backbone C3–C5",
    "neck, strides 8–32",
    "neck, stride 64",
    "encoder layers",
    "token scores",
    "selected tokens",
    "selected features",
    "initial boxes",
    "decoder states",
    "decoder boxes",
    "objectness",
    "alignment, plain",
    "alignment, refined",
    "alignment, encoder",
    "distiller branches",
    "projections φ",
    "prompts",
    "T5 encoder",
    "T5 logits, teacher-forced",
    "T5 loss",
    "greedy tokens",
    "beam tokens",
    "beam scores",
    "denoising inputs",
    "denoising attention mask",
    "matching costs",
    "matchings",
    "unit losses",
    "unit loss gradients",
    "loss terms",
    "total loss",
    "gradient norms of the total",
    "gradient norms of the eight groups",
    "gradient entries",
    "text noise σ",
    "training, selected tokens",
    "training, matched pairs",
    "training, worst loss term",
    "training, median loss term",
    "training, total loss",
    "training, gradient norm",
    "training, norms of the parameters",
    "training, norms of their changes",
    "training, changes, sampled",
    "training, changes, whole tensors",
    "Swin (transformers)",
    "T5, gated (transformers)",
    "T5, ungated (transformers)",
    "CLIP text (transformers)",
    "optimizer step (torch AdamW)",
)


class Row(NamedTuple):
    stage: str
    reference: str
    absolute: float
    relative: float
    tolerance: float
    is_relative: bool


def enter(stage: str, reference: str, want: Any, got: Any, tolerance: float, relative: bool = False) -> None:
    """Adds a comparison. `relative`: the tolerance is of the relative error, which is that of the largest number."""
    assert stage in STAGES, stage
    want, got = np.asarray(want, np.float64), np.asarray(got, np.float64)
    absolute = float(np.abs(want - got).max(initial=0.0))
    scale = float(np.abs(want).max(initial=0.0))
    enter_error(stage, reference, absolute, absolute / scale if scale else absolute, tolerance, relative)


def enter_error(
    stage: str, reference: str, absolute: float, relative: float, tolerance: float, is_relative: bool = False
) -> None:
    """Adds a comparison whose errors are known."""
    path = os.environ.get(ROWS)
    if path:
        row = Row(stage, reference, float(absolute), float(relative), tolerance, is_relative)
        with Path(path).open("a") as file:
            file.write(json.dumps(row) + "\n")


def read(path: Path) -> list[Row]:
    """The largest errors of each stage and reference, in the ladder's order."""
    worst: dict[tuple[str, str], Row] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        row = Row(*json.loads(line))
        key = row.stage, row.reference
        old = worst.get(key, row)
        worst[key] = row._replace(
            absolute=max(row.absolute, old.absolute),
            relative=max(row.relative, old.relative),
            tolerance=max(row.tolerance, old.tolerance),
        )
    return sorted(worst.values(), key=lambda row: (STAGES.index(row.stage), row.reference))


def missing(rows: Iterable[Row], fast: bool = False) -> list[str]:
    """Stages that no test has entered; where only the `fast` tests ran, training over several steps is none of them."""
    entered = {row.stage for row in rows}
    return [stage for stage in STAGES if stage not in entered and not (fast and stage.startswith(STEPS))]


def markdown(rows: Iterable[Row]) -> str:
    lines = [
        "| stage | reference | max abs error | max relative error | tolerance |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        kind = " relative" if row.is_relative else ""
        tolerance = f"{row.tolerance:.0e}{kind}" if row.tolerance else "exact"
        lines.append(f"| {row.stage} | {row.reference} | {row.absolute:.1e} | {row.relative:.1e} | {tolerance} |")
    return "\n".join(lines) + "\n"
