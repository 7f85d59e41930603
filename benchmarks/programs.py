"""Exported programs beside the checkpoint that they were written from: seconds an image, and how far apart they are.

    python -m benchmarks.programs [DIR] [--images 30]

DIR: what `opendet programs` takes (default: scenes_tiny). Both see the same drawn scenes, of several sizes, one at a
time and in turn, after one that compiles.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

import opendet_jax
from benchmarks.__main__ import heading_of_run
from opendet_jax.data.scene_drawing import draw_scene
from opendet_jax.exported import write

SIZES = ((128, 128), (320, 240), (240, 320), (640, 640))  # of the scenes, width × height


def scene(index: int) -> np.ndarray:
    pixels, _ = draw_scene(seed=11, split="val", index=index, size=128)
    return np.asarray(Image.fromarray(pixels).resize(SIZES[index % len(SIZES)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", default="scenes_tiny", metavar="DIR")
    parser.add_argument("--images", type=int, default=30, help="default: %(default)s")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "programs"
        started = time.perf_counter()
        write(arguments.source, out)
        heading = heading_of_run().replace("make bench", "python -m benchmarks.programs")
        print(f"\n{heading}\n\nwritten in {time.perf_counter() - started:.1f} s\n")
        print("| file | MiB |\n|---|---|")
        for file in sorted(out.iterdir()):
            print(f"| {file.name} | {file.stat().st_size / 2**20:.2f} |")
        detectors = {"checkpoint": opendet_jax.load(arguments.source), "programs": opendet_jax.run_exported(out)}
    seconds: dict[str, list[float]] = {name: [] for name in detectors}
    differences = {"boxes, in sides of the image": 0.0, "scores": 0.0, "log-probabilities of names": 0.0}
    objects = other_names = 0
    for index in range(arguments.images):
        image, found = scene(index), {}
        for name, detector in detectors.items():
            if index < len(SIZES):
                detector.detect(image, min_score=0.0)  # compiles
            started = time.perf_counter()
            found[name] = detector.detect(image, min_score=0.0)
            seconds[name].append(time.perf_counter() - started)
        one, other = found.values()
        objects += len(one)
        other_names += sum(a != b for a, b in zip(one.names, other.names, strict=True))
        sides = np.tile(image.shape[1::-1], 2)
        pairs = ((one.boxes / sides, other.boxes / sides), (one.scores, other.scores))
        for name, (a, b) in zip(differences, (*pairs, (one.name_scores, other.name_scores)), strict=True):
            differences[name] = max(differences[name], float(np.abs(a - b).max(initial=0.0)))
    print(f"\n| {arguments.images} images, {objects} objects | |\n|---|---|")
    for name, values in seconds.items():
        print(f"| median seconds an image, {name} | {statistics.median(values):.3f} |")
    for name, value in differences.items():
        print(f"| largest difference, {name} | {value:.1e} |")
    print(f"| objects with another name | {other_names} |")


if __name__ == "__main__":
    main()
