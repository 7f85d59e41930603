"""How the time and the memory of inference grow: over the image's side, queries, the batch, and the length of names.

    python -m benchmarks.growth            # into docs/growth.png and docs/benchmarks.md
    python -m benchmarks.growth --reuse    # only these, from the results that are there

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

from benchmarks.__main__ import PAGE, filled, heading_of_run
from benchmarks.comparison import peak_memory

POINTS = {
    "tokens of an image (its side: 320 … 1280 pixels)": [{"side": side} for side in (320, 480, 640, 800, 960, 1280)],
    "queries": [{"queries": queries} for queries in (100, 300, 600, 900)],
    "images a batch": [{"batch": batch} for batch in (1, 2, 4, 8)],
    "tokens a name": [{"tokens": tokens} for tokens in (2, 4, 8, 16, 30)],
}
DEFAULTS = {"side": 480, "queries": 300, "batch": 1, "tokens": 0}  # no names unless they are the subject
PROMPTS = 64  # named at once
CHART = Path("docs/growth.png")
COLUMNS = (("value", ".0f"), ("seconds", ".2f"), ("memory", ".2f"))
STRIDES = (8, 16, 32, 64)  # of the levels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--point", help="json of one point: measure it in this process and print it")
    parser.add_argument("--reuse", action="store_true", help="measure nothing: take what an earlier run left")
    parser.add_argument("--results", type=Path, default=Path("runs/benchmarks"), help="folder (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.point:
        print(json.dumps(measure(**(DEFAULTS | json.loads(arguments.point)))))
        return
    file: Path = arguments.results / "growth.json"
    if not arguments.reuse:
        file.parent.mkdir(parents=True, exist_ok=True)
        heading = heading_of_run()
        found = {subject: [run(point) for point in points] for subject, points in POINTS.items()}
        file.write_text(json.dumps({"heading": heading, "found": found}), encoding="utf-8")
    results = json.loads(file.read_text(encoding="utf-8"))
    draw(results["found"])
    page = filled(PAGE.read_text(encoding="utf-8"), "growth", results["heading"] + "\n" + table(results["found"]))
    PAGE.write_text(page, encoding="utf-8")


def run(point: dict[str, int]) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.growth", "--point", json.dumps(point)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    [(subject, value)] = point.items()
    x = sum((value // stride) ** 2 for stride in STRIDES) if subject == "side" else value
    result = {"value": x, **json.loads(done.stdout.splitlines()[-1])}
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


def table(found: dict[str, list[dict[str, float]]]) -> str:
    rows = [
        f"| {subject} | " + " | ".join(", ".join(f"{point[key]:{form}}" for point in points) for key, form in COLUMNS)
        for subject, points in found.items()
    ]
    return "\n".join(
        ["| over | values | seconds | peak memory, GiB |", "|---|---|---|---|", *(f"{row} |" for row in rows)]
    )


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
