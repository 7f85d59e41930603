"""Times and memory of the evaluation on made-up detections, beside the packages lvis and pycocotools.

    python -m benchmarks.evaluation                    # 200 images × 300 detections × 15 classes, all three
    python -m benchmarks.evaluation --minival          # up to 4,809 images × 13,500 detections × 1,203 classes, ours
    python -m benchmarks.evaluation --images 50 --detections 300 --classes 15

Each program runs in a process of its own, from a json file in memory to its metrics; a fixed seed makes the numbers.
Memory is the peak of resident memory; what is there before evaluation starts is given apart. With --minival detections
come image by image, as from a model, and are forgotten; memory is printed on the way.
"""

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.comparison import peak_memory

WIDTH, HEIGHT = 640, 480
ROUNDS = 5
KNOWN = 20  # classes of an image that are known to be there or not, as in LVIS
OBJECTS = 11  # of an image


class Size(NamedTuple):
    images: int
    detections: int  # of an image
    classes: int


COMPARED = Size(200, 300, 15)
MINIVAL = Size(4809, 13_500, 1203)  # 900 boxes of 15 classes in each image
Program = Callable[[Path, list[dict[str, Any]], str], dict[str, Any]]


def truth(size: Size) -> dict[str, Any]:
    """In LVIS's form, with the fields that pycocotools wants too."""
    rng = np.random.default_rng([0, *size])
    classes = np.arange(1, size.classes + 1)
    images, annotations = [], []
    for image_id in range(1, size.images + 1):
        known = rng.choice(classes, min(KNOWN, size.classes), replace=False).tolist()
        present, absent = known[: len(known) // 2 + 1], known[len(known) // 2 + 1 :]
        images.append(
            {
                "id": image_id,
                "file_name": f"{image_id}.jpg",
                "width": WIDTH,
                "height": HEIGHT,
                "neg_category_ids": absent,
                "not_exhaustive_category_ids": present[:1],
            }
        )
        for x, y, w, h in boxes(rng, OBJECTS).tolist():
            annotation = {"id": len(annotations) + 1, "image_id": image_id, "category_id": int(rng.choice(present))}
            annotations.append({**annotation, "bbox": [x, y, w, h], "area": w * h, "iscrowd": 0})
    categories = [{"id": c, "name": f"class {c}", "frequency": "rcf"[c % 3]} for c in classes.tolist()]
    return {"images": images, "annotations": annotations, "categories": categories}


def boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    sizes = np.exp(rng.uniform(np.log(10), np.log(400), (count, 2))).clip(max=[WIDTH, HEIGHT])
    return np.concatenate([rng.uniform(0, 1, (count, 2)) * ([WIDTH, HEIGHT] - sizes), sizes], axis=1)


def detections(content: dict[str, Any], size: Size) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
    """(image id, classes, boxes, scores) of each image: a third near its objects and mostly of their classes."""
    inside: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        inside[annotation["image_id"]].append(annotation)
    for image_id, objects in inside.items():
        rng = np.random.default_rng([1, image_id, *size])
        found = boxes(rng, size.detections)
        category = rng.integers(1, size.classes + 1, size.detections)
        near = rng.choice(len(objects), size.detections // 3)
        true = np.array([annotation["bbox"] for annotation in objects])[near]
        found[: len(near)] = true * rng.uniform(0.85, 1.15, true.shape)
        right = np.flatnonzero(rng.uniform(size=len(near)) < 0.7)
        category[right] = np.array([annotation["category_id"] for annotation in objects])[near[right]]
        yield image_id, category, found, rng.uniform(size=size.detections)


def as_results(content: dict[str, Any], size: Size) -> list[dict[str, Any]]:
    return [
        {"image_id": image_id, "category_id": category, "bbox": bbox, "score": score}
        for image_id, *columns in detections(content, size)
        for category, bbox, score in zip(*(column.tolist() for column in columns), strict=True)
    ]


def ours(annotations: Path, results: list[dict[str, Any]], protocol: str) -> dict[str, Any]:
    from opendet_jax.evaluate.evaluator import Evaluator
    from opendet_jax.evaluate.results import Results, ScoredBoxes

    columns = [np.array([result[key] for result in results]) for key in ("category_id", "bbox", "score", "image_id")]
    evaluator = Evaluator(json.loads(annotations.read_text()), "coco" if protocol == "coco" else "lvis")
    for image_id, found, numbers in Results(columns[3], ScoredBoxes(*columns[:3])).by_image():
        evaluator.add(image_id, found, numbers=numbers)
    return evaluator.finish().metrics


def package(annotations: Path, results: list[dict[str, Any]], protocol: str) -> dict[str, Any]:
    from tests.evaluate.packages import run_coco, run_lvis

    return run_coco(annotations, results) if protocol == "coco" else run_lvis(annotations, results)


class Measured(NamedTuple):
    seconds: float  # of the processor, which other programs do not lengthen as much
    before: int  # MiB
    peak: int  # MiB
    metrics: dict[str, Any]


def measure(program: Program, protocol: str, size: Size) -> Measured:
    content = truth(size)
    results = as_results(content, size)
    with tempfile.TemporaryDirectory() as folder:
        annotations = Path(folder) / "truth.json"
        annotations.write_text(json.dumps(content))
        small = content["images"][0]["id"]
        program(annotations, [result for result in results if result["image_id"] == small], protocol)  # imports, caches
        before, started = peak(), time.process_time()
        metrics = program(annotations, results, protocol)
        return Measured(time.process_time() - started, before, peak(), metrics)


def peak() -> int:
    return round(peak_memory() * 1024)


def compare(size: Size) -> None:
    """In turn, each in a process of its own, ROUNDS times."""
    print(f"Medians of {ROUNDS} rounds; the ratio is the package's seconds over ours in one round.\n")
    print(
        "| protocol | package, CPU s | ours, CPU s | ratio (min–max) | package, MiB | ours, MiB | largest difference |"
    )
    print("|---|---|---|---|---|---|---|")
    for protocol in ("lvis", "coco"):
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            tasks = [(package, protocol, size), (ours, protocol, size)] * ROUNDS
            measured = pool.starmap(measure, tasks, chunksize=1)
        theirs, mine = measured[::2], measured[1::2]
        ratios = [other.seconds / own.seconds for other, own in zip(theirs, mine, strict=True)]
        other, own = (statistics.median(one.seconds for one in side) for side in (theirs, mine))
        numbers = mine[0].metrics
        differences = [abs((numbers[key] or 0) - (x or 0)) for key, x in theirs[0].metrics.items() if key in numbers]
        ratio = f"{statistics.median(ratios):.1f} ({min(ratios):.1f}–{max(ratios):.1f})"
        print(
            f"| {protocol} | {other:.2f} | {own:.2f} | {ratio} "
            f"| {theirs[0].before} → {theirs[0].peak} | {mine[0].before} → {mine[0].peak} | {max(differences):.1g} |",
            flush=True,
        )


def stream(size: Size) -> None:
    from opendet_jax.evaluate.evaluator import Evaluator
    from opendet_jax.evaluate.results import ScoredBoxes

    content = truth(size)
    evaluator = Evaluator(content)
    busy, total = 0.0, 0
    print(f"| images | detections | CPU seconds in `add` | peak MiB |\n|---|---|---|---|\n| 0 | 0 | 0 | {peak()} |")
    for number, (image_id, *columns) in enumerate(detections(content, size), 1):
        found = ScoredBoxes(*columns)
        started = time.process_time()
        evaluator.add(image_id, found)
        busy += time.process_time() - started
        total += len(found)
        if number % max(1, size.images // 10) == 0 or number == size.images:
            print(f"| {number} | {total:,} | {busy:.0f} | {peak()} |", flush=True)
    started = time.process_time()
    metrics = evaluator.finish().metrics
    seconds = time.process_time() - started
    print(f"\nfinish: {seconds:.0f} CPU seconds, peak {peak()} MiB; fixed AP {metrics['fixed_AP']:.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minival", action="store_true", help="ours alone, image by image")
    parser.add_argument("--images", type=int, help="default: 200, with --minival 4809")
    parser.add_argument("--detections", type=int, help="of an image; default: 300, with --minival 13500")
    parser.add_argument("--classes", type=int, help="default: 15, with --minival 1203")
    options = parser.parse_args()
    default = MINIVAL if options.minival else COMPARED
    size = Size(
        options.images or default.images, options.detections or default.detections, options.classes or default.classes
    )
    print(f"{size.images} images × {size.detections} detections × {size.classes} classes\n")
    if options.minival:
        stream(size)
    else:
        compare(size)


if __name__ == "__main__":
    main()
