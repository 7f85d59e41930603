"""The metrics as a few lines of text."""

from collections.abc import Mapping
from typing import Any

from opendet_jax.evaluate.evaluator import Protocol

_SIZES = ("APs", "APm", "APl")
_LVIS = ("AP", "AP50", "AP75", "APr", "APc", "APf", "APu", *_SIZES)
_COCO = ("AP", "AP50", "AP75", *_SIZES, "AR1", "AR10", "AR100")
_COCO_TITLE = "COCO AP, ≤ 100 a class"


def summary(metrics: Mapping[str, Any], protocol: Protocol = "lvis") -> str:
    """The metrics in percent, a line a group, the protocol's own first; – where there is nothing to measure."""
    rows: list[tuple[str, tuple[str, ...]]]
    if protocol == "coco":
        rows = [(_COCO_TITLE, _COCO)]
    else:
        rows = [("LVIS AP, ≤ 300 an image", _LVIS), ("fixed AP", tuple(f"fixed_{key}" for key in _LVIS))]
        rows = rows if protocol == "lvis" else rows[::-1]
    if "coco_AP" in metrics:
        rows.append((_COCO_TITLE, tuple(f"coco_{key}" for key in _COCO)))
    rows += [
        ("whatever the name", ("agnostic_AP", "agnostic_AP50", "agnostic_AR", "recall50")),
        ("names of boxes found", ("naming_accuracy", "exact_name_accuracy", "synonym_accuracy")),
    ]
    return "\n".join(_line(title, {key: metrics[key] for key in keys}) for title, keys in rows)


def _line(title: str, values: Mapping[str, float | None]) -> str:
    cells = (f"{key} {'–' if value is None else f'{100 * value:.1f}'}" for key, value in values.items())
    return f"  {title:<24} " + "  ".join(cells)
