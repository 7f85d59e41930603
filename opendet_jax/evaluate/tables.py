"""Tables of an evaluation: one line a class, and what was called what."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from opendet_jax.evaluate.evaluator import Evaluation
from opendet_jax.evaluate.matching import AREAS
from opendet_jax.files import replacing


def write_classes(evaluation: Evaluation, path: Path) -> None:
    """A line a class. A cell without a number is empty: the class has no object to be found.

    objects: to be found. detections: those that count. found: objects found at IoU 0.5 whatever they are called; named:
    those of them that were given the class. AP, AP50 and AR, and with a prefix those of other protocols.
    """
    truth, localisation = evaluation.truth, evaluation.localisation
    prefixes = list(evaluation.curves)
    header = ["id", "name", "frequency", "objects", "detections", "found", "named"]
    header += [prefix + key for prefix in prefixes for key in ("AP", "AP50", "AR")]
    lines = []
    for place, category in enumerate(truth.categories):
        line = [category["id"], category["name"], truth.groups[place], truth.wanted[place, list(AREAS).index("all")]]
        line += [evaluation.counted[place], localisation.found[place], localisation.of_its_class[place]]
        for prefix in prefixes:
            curves, own = evaluation.curves[prefix], np.array([place])
            line += [curves.ap(own), curves.ap(own, iou=0.5), curves.ar(own)]
        lines.append(line)
    _write(path, header, lines)


def write_names(evaluation: Evaluation, path: Path) -> None:
    """What objects found at IoU 0.5 were called: class, name given, times; most frequent first."""
    names = [category["name"] for category in evaluation.truth.categories]
    called = sorted(evaluation.localisation.called.items(), key=lambda item: (-item[1], item[0]))
    _write(path, ["class", "called", "times"], ([names[true], name, times] for (true, name), times in called))


def _write(path: Path, header: Sequence[str], lines: Iterable[Sequence[Any]]) -> None:
    with replacing(path) as part, part.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(lines)
