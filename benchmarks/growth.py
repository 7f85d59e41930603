"""How the time and the memory of inference grow: over the image's side, queries, the batch, and the length of names.

    python -m benchmarks.growth          # writes docs/growth.png and prints the numbers

Swin-T, the paper's sizes. Each point is a process of its own: the median of three runs after the compiling one, and the
peak memory.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.comparison import peak_memory

POINTS = {
    "image side, pixels": [{"side": side} for side in (320, 480, 640, 800, 960, 1280)],
    "queries": [{"queries": queries} for queries in (100, 300, 600, 900)],
    "images a batch": [{"batch": batch} for batch in (1, 2, 4, 8)],
    "tokens a name": [{"tokens": tokens} for tokens in (2, 4, 8, 16, 30)],
}
DEFAULTS = {"side": 480, "queries": 300, "batch": 1, "tokens": 0}  # no names unless they are the subject
PROMPTS = 64  # named at once
CHART = Path("docs/growth.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--point", help="json of one point: measure it in this process and print it")
    arguments = parser.parse_args()
    if arguments.point:
        print(json.dumps(measure(**(DEFAULTS | json.loads(arguments.point)))))
        return
    found = {subject: [run(point) for point in points] for subject, points in POINTS.items()}
    draw(found)


def run(point: dict[str, int]) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.growth", "--point", json.dumps(point)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    [value] = point.values()
    result = {"value": value, **json.loads(done.stdout.splitlines()[-1])}
    print(f"{point}: {result['seconds']:.2f} s, {result['memory']:.2f} GiB", flush=True)
    return result


def measure(side: int, queries: int, batch: int, tokens: int) -> dict[str, float]:
    import jax
    import numpy as np

    from opendet_jax.batch import Images
    from opendet_jax.config import ModelConfig, T5Config
    from opendet_jax.model.opendet import OpenDet, init_params

    t5 = T5Config() if tokens else T5Config(vocab_size=32, num_layers=1, num_heads=1, ffn_width=8)
    model = OpenDet(ModelConfig(max_queries=queries, min_queries=queries, t5=t5))
    params = init_params(model, jax.random.key(0))
    rng = np.random.default_rng(0)
    if tokens:
        prompts = rng.standard_normal((PROMPTS, model.config.text_width), np.float32)

        def work():
            return generate(params, prompts)

        generate = jax.jit(lambda params, x: model.apply({"params": params}, x, 3, tokens, method="generate").tokens)
    else:
        images = Images(rng.integers(0, 256, (batch, side, side, 3), np.uint8), np.ones((batch, side, side), bool))

        def work():
            return detect(params, images)

        @jax.jit
        def detect(params, images):
            detected = model.apply({"params": params}, images, method="detect")
            return detected.decoded.boxes[-1], detected.decoded.objectness[-1], detected.prompts

    jax.block_until_ready(work())
    times = []
    for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready(work())
        times.append(time.perf_counter() - start)
    return {"seconds": statistics.median(times), "memory": peak_memory()}


def draw(found: dict[str, list[dict[str, float]]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.4), layout="constrained")
    for axes, (subject, points) in zip(figure.subplots(2, 2).flat, found.items(), strict=True):
        values, seconds, gib = ([point[key] for point in points] for key in ("value", "seconds", "memory"))
        axes.plot(values, seconds, "o-", color="#3b6ea5")
        axes.set_xlabel(subject)
        axes.set_ylabel("seconds", color="#3b6ea5")
        axes.set_ylim(0, 1.1 * max(seconds))
        memory = axes.twinx()
        memory.plot(values, gib, "s--", color="#c0504d")
        memory.set_ylabel("peak memory, GiB", color="#c0504d")
        memory.set_ylim(0, 1.1 * max(gib))
    figure.savefig(CHART, dpi=120)


if __name__ == "__main__":
    main()
