"""Images a second of `Detector.detect` one by one and in batches, and of given names, with the model that comes along.

Drawn scenes of 320 pixels. Everything is compiled before, and the ways take turns; a ratio is of two of one round, and
the median of the rounds is shown.

    python -m benchmarks.batches
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np

import opendet_jax
from benchmarks.__main__ import machine
from opendet_jax.data.scene_drawing import KINDS, draw_scene
from opendet_jax.predict.detector import Detector

SIZE, LONG_LIST = 320, 1203  # pixels; names, as many as LVIS has
ADJECTIVES = ("large", "small", "old", "new", "wet", "dry", "far", "near", "left", "right", "upper", "lower", "dark")


def detector_of(size: int) -> Detector:
    """The model that comes along, at a size of its own."""
    detector = opendet_jax.load("scenes_tiny")
    data = replace(detector.config.data, eval_short_side=size, max_long_side=size, buckets=((size, size),))
    inference = detector._inference
    return Detector(inference.model, inference.params, replace(detector.config, data=data), inference._decode)


def names(count: int) -> list[str]:
    """Different ones, of the lengths that the model knows."""
    longer = [f"{adjective} {kind.name}" for adjective in ADJECTIVES for kind in KINDS]
    return [*(kind.name for kind in KINDS), *longer][:count]


def in_turn(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    for way in ways.values():
        way()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=32, help="drawn scenes (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each way (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=8, help="(default: %(default)s)")
    options = parser.parse_args()
    detector = detector_of(SIZE)
    images = [draw_scene(seed=5, split="val", index=index, size=SIZE)[0] for index in range(options.images)]
    several = {"batch_size": options.batch_size}
    ways: dict[str, Callable[[], object]] = {
        "one by one": lambda: detector.detect(images, batch_size=1),
        f"batches of {options.batch_size}": lambda: detector.detect(images, **several),
    }
    for count in (20, LONG_LIST):
        given = names(count)
        for by in ("language", "alignment"):
            ways[f"… {count:,} names, by {by}"] = lambda given=given, by=by: detector.detect(
                images, names=given, by=by, **several
            )
    seconds = in_turn(ways, options.rounds)
    first = next(iter(seconds.values()))
    print(f"{machine()}; {options.images} scenes of {SIZE} pixels, {options.rounds} rounds\n")
    print("| `detect` | images a second | ratio to one by one | its range |\n|---|---|---|---|")
    for name, own in seconds.items():
        ratios = np.array(first) / np.array(own)
        rate = options.images / statistics.median(own)
        print(f"| {name} | {rate:.1f} | {np.median(ratios):.2f} | {ratios.min():.2f}–{ratios.max():.2f} |")


if __name__ == "__main__":
    main()
