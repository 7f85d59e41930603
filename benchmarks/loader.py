"""The loader alone: what an image costs in each part, images a second by workers, and what a training step consumes.

    python -m benchmarks.loader    # drawn scenes of 640 pixels
    python -m benchmarks.loader --annotations minilvis/train.json --images minilvis/images
    python -m benchmarks.loader --annotations minilvis/train.json --images minilvis/images \
        --config configs/minilvis.py --train 8

Photographs should be JPEGs of 640 pixels, as COCO's are. Each number of workers runs on as many cores. CPU seconds
are those of the process, into which other work on the machine does not count; seconds are by the clock. The text
embeddings are a table of random rows, as wide as the model's.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from opendet_jax.config_files import config_from_arguments
from opendet_jax.data.scenes import generate
from opendet_jax.errors import InputError

SCENE_SIZE = 640
ROUNDS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--annotations", help="json in LVIS or COCO form (default: scenes are drawn)")
    parser.add_argument("--images", help="folder of its images")
    parser.add_argument("--scenes", type=int, default=256, help="how many are drawn (default: %(default)s)")
    parser.add_argument("--config", default="configs/swin_t.py", help="default: %(default)s")
    parser.add_argument("--batches", type=int, default=24, help="timed for each row (default: %(default)s)")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="threads, each with a core of its own")
    parser.add_argument("--train", type=int, default=0, metavar="STEPS", help="time so many training steps, too")
    arguments = parser.parse_args()
    if bool(arguments.annotations) != bool(arguments.images):
        parser.error("--annotations and --images belong together")

    try:
        run(arguments)
    except InputError as error:
        sys.exit(f"error: {error}")


def run(arguments: argparse.Namespace) -> None:
    """Prints the tables."""
    with TemporaryDirectory() as folder:
        annotations, images = arguments.annotations, arguments.images
        if not annotations:
            annotations = generate(folder, arguments.scenes, seed=0, size=SCENE_SIZE)
            images = annotations.parent / "images"
        paths = (f"--config.data.train.annotations={annotations}", f"--config.data.train.images={images}")
        every = ("--config.data.source=json", "--config.data.held_out=0.0", "--config.data.eval.annotations=")
        config = config_from_arguments((f"--config={arguments.config}", *paths, *every))
        bench = Bench(config, Path(folder))
        bench.parts(arguments.batches)
        bench.scaling(arguments.batches, arguments.workers)
        if arguments.train:
            bench.consumption(arguments.train)


class Bench:
    """One config over one set of photographs."""

    def __init__(self, config, folder: Path):
        from absl import logging

        from opendet_jax.data.datasets import load_datasets
        from opendet_jax.data.text_embeddings import TableEmbedder
        from opendet_jax.data.tokenizer import load_tokenizer

        logging.set_verbosity(logging.ERROR)
        self.config = config
        self.mixture, _ = load_datasets(config, folder)
        names = self.mixture.names()
        rows = np.random.default_rng(0).normal(size=(len(names), config.model.text_width))
        np.save(folder / "table.npy", rows.astype(np.float32))
        (folder / "table.json").write_text(json.dumps(names))
        self.embedder = TableEmbedder(folder / "table.npy")
        self.tokenizer = load_tokenizer("byt5", 384)
        sizes = [os.path.getsize(record.path) for record in self.mixture.records]
        sides = [max(record.width, record.height) for record in self.mixture.records]
        print(
            f"{len(sizes)} photographs, longer side {np.median(sides):.0f} pixels (median), "
            f"{np.mean(sizes) / 2**10:.0f} KiB each; {config.name}, batches of {config.data.batch_size}\n"
        )

    def stream(self, workers: int):
        from opendet_jax.data.pipeline import training_stream

        data = replace(self.config.data, threads=workers)
        return iter(training_stream(self.mixture, data, self.tokenizer, self.embedder, 0))

    def parts(self, batches: int) -> None:
        """Prints the CPU milliseconds of each part; "the rest" is what the whole takes beyond them."""
        from opendet_jax.data.images import open_record
        from opendet_jax.data.plan import example_rng, plan_epoch
        from opendet_jax.data.transforms import Geometry, fit, place, resample, training_geometry

        data, clock = self.config.data, Clock()
        with clock("plan of the epoch"):
            plan = plan_epoch(self.mixture, data, 0, 0)
        clock.spent["plan of the epoch"] *= batches * data.batch_size / self.mixture.shows  # of so many images
        stream = self.stream(0)
        next(stream)  # makes its plan
        for planned in plan[1 : batches + 1]:
            bucket = data.buckets[planned.bucket]
            with clock("batch"):
                pixels, mask = (
                    np.zeros((data.batch_size, *bucket, 3), np.uint8),
                    np.zeros((data.batch_size, *bucket), bool),
                )
            for i, slot in enumerate(planned.slots):
                record = self.mixture.records[slot.record]
                drawn = training_geometry(example_rng(0, 0, slot.position), record, data)
                geometry = Geometry(drawn.window, fit(drawn.size, bucket), drawn.flip)
                with clock("decode"):
                    image = open_record(record)
                whole = geometry.window == (0, 0, record.width, record.height)
                with clock("resize, whole pictures" if whole else "crop and resize, the others"):
                    picture = resample(image, geometry)
                with clock("batch"):
                    place(picture, pixels[i], mask[i])
            del pixels, mask
            with clock("all"):
                next(stream)
        images = len(plan[1 : batches + 1]) * data.batch_size
        total = (clock.spent.pop("all") + clock.spent["plan of the epoch"]) / images
        seconds_of = {name: seconds / images for name, seconds in clock.spent.items()}
        seconds_of["the rest: geometry, boxes, names, embeddings"] = total - sum(seconds_of.values())
        print("| part | CPU ms an image | share |\n|---|---|---|")
        for name, seconds in seconds_of.items():
            print(f"| {name} | {1e3 * seconds:.2f} | {seconds / total:.0%} |")
        print(f"| all | {1e3 * total:.2f} | |\n")

    def scaling(self, batches: int, workers: list[int]) -> None:
        """Prints images a second with each number of workers: of ROUNDS times `batches` the median, least and most."""
        available = sorted(os.sched_getaffinity(0))
        print("| workers, cores | images/s (min–max) | images/s a core | images per CPU second |\n|---|---|---|---|")
        for count in workers:
            os.sched_setaffinity(0, available[:count])
            stream = self.stream(count)
            for _ in range(max(self.config.data.prefetch, count) + 1):  # what is read ahead before the clock starts
                next(stream)
            images, cpu, rates = batches * self.config.data.batch_size, time.process_time(), []
            for _ in range(ROUNDS):
                started = time.perf_counter()
                for _ in range(batches):
                    next(stream)
                rates.append(images / (time.perf_counter() - started))
            of_processor = ROUNDS * images / (time.process_time() - cpu)
            rate, spread = statistics.median(rates), f"{min(rates):.0f}–{max(rates):.0f}"
            print(f"| {count} | {rate:.1f} ({spread}) | {rate / count:.1f} | {of_processor:.1f} |", flush=True)
            del stream
        os.sched_setaffinity(0, available)
        print()

    def consumption(self, steps: int) -> None:
        """Prints the images a second of the training step on this machine's devices, without the loader."""
        import jax

        from opendet_jax.compilation import enable_cache
        from opendet_jax.model.opendet import OpenDet
        from opendet_jax.parallel.mesh import make_mesh, place_batch
        from opendet_jax.train.optimizer import make_optimizer
        from opendet_jax.train.run import initial_state
        from opendet_jax.train.step import jit_step, make_train_step

        enable_cache()
        stream, mesh = self.stream(0), make_mesh(self.config.mesh)
        example = next(stream)
        while example.batch.images.mask.shape[1:] != tuple(self.config.data.buckets[0]):
            example = next(stream)  # one shape, so that one program is compiled
        batch = place_batch(example.batch, mesh)
        model = OpenDet(self.config.model, self.config.ablation)
        optimizer = make_optimizer(self.config.optimizer, self.config.ablation)
        state = initial_state(model, optimizer, self.config, mesh)
        step = jit_step(make_train_step(model, optimizer, self.config), state, mesh)
        with jax.set_mesh(mesh):
            state, _ = jax.block_until_ready(step(state, batch))
            started, cpu = time.perf_counter(), time.process_time()
            for _ in range(steps):
                state, _ = step(state, batch)
            jax.block_until_ready(state)
            seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
        images = steps * self.config.data.batch_size
        devices = f"{jax.device_count()} × {jax.devices()[0].device_kind}"
        print(f"training step of {self.config.name} on {devices}: {images / seconds:.2f} images/s", end="")
        print(f", {images / cpu_seconds:.2f} images per CPU second, {self.config.data.buckets[0]} pixels")


class Clock:
    """CPU seconds by name."""

    def __init__(self):
        self.spent: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.process_time()
        yield
        self.spent[name] += time.process_time() - started


if __name__ == "__main__":
    main()
