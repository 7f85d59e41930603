"""What `python -m benchmarks.gpu` measures, a part in a process of its own: rows of json, printed as they are found.

python -m benchmarks.gpu_parts kernels
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.compile_check import KERNEL, LARGE, SMALL, Case, count, kernels, plain
from opendet_jax.batch import Batch, Images, Objects
from opendet_jax.compilation import enable_cache
from opendet_jax.config import Config
from opendet_jax.config_files import parse_config
from opendet_jax.inference import Inference, Selection
from opendet_jax.model.opendet import OpenDet, init_params
from opendet_jax.ops.deformable_attention import reference
from opendet_jax.parallel.mesh import make_mesh, place_batch
from opendet_jax.scaling.machines import MACHINES
from opendet_jax.scaling.program import largest_bucket, products
from opendet_jax.train.optimizer import fresh_state, make_optimizer
from opendet_jax.train.step import jit_step, make_train_step

Row = dict[str, Any]
DTYPES = (jnp.float32, jnp.bfloat16)
LITTLE = ((5, 7), (3, 4))
# Bytes a second and operations a second (bfloat16, and float32 without tensor cores) that the makers state.
H100, FLOAT32 = MACHINES["h100"], 67e12
RATES = {"H100": (H100.memory_rate, H100.flops, FLOAT32), "H200": (4800e9, H100.flops, FLOAT32)}


class Sizes(NamedTuple):
    """What is measured: on a GPU, or on a CPU to see that it all runs."""

    checked: tuple[Case, ...]
    timed: tuple[Case, ...]
    batches: tuple[int, ...]
    prompts: tuple[int, ...]
    config: Callable[[], Config]
    rounds: int
    calls: int  # queued in a round


def swin_t() -> Config:
    from configs.swin_t import get_config

    config = get_config()
    config.model.dtype = "bfloat16"
    return parse_config(config)


def tiny() -> Config:
    from tests.reliability.tiny import get_config

    config = get_config()
    config.model.dtype = "bfloat16"
    return parse_config(config)


def each_dtype(*cases: Case) -> tuple[Case, ...]:
    return tuple(case._replace(dtype=dtype) for case in cases for dtype in DTYPES)


FULL = Sizes(
    each_dtype(
        Case("encoder, 480×640", SMALL, 4, 0, jnp.float32),
        Case("decoder, 900 queries, 480×640", SMALL, 4, 900, jnp.float32),
        Case("distiller, 900 queries, 16 points, 480×640", SMALL, 16, 900, jnp.float32),
        Case("131 queries, 1 point, odd levels", ((13, 17), (7, 9)), 1, 131, jnp.float32),
    ),
    each_dtype(
        Case("encoder, 800×1344", LARGE, 4, 0, jnp.float32),
        Case("decoder, 900 queries, 800×1344", LARGE, 4, 900, jnp.float32),
        Case("distiller, 900 queries, 16 points, 800×1344", LARGE, 16, 900, jnp.float32),
    ),
    batches=(1, 2, 4),
    prompts=(100, 300),
    config=swin_t,
    rounds=7,
    calls=20,
)
TINY = Sizes(
    each_dtype(Case("little", LITTLE, 2, 9, jnp.float32)),
    each_dtype(Case("little", LITTLE, 2, 9, jnp.float32)),
    batches=(1,),
    prompts=(3,),
    config=tiny,
    rounds=2,
    calls=2,
)


def rates() -> tuple[float, float, float] | None:
    """Of this device: bytes and operations a second, where they are known."""
    kind = jax.devices()[0].device_kind
    return next((found for name, found in RATES.items() if name in kind), None)


def milliseconds(run: Callable[[], Any], sizes: Sizes) -> float:
    """Of one call, the median of the rounds; a round's calls are queued without waiting, so that the device is busy."""
    jax.block_until_ready(run())
    spent = []
    for _ in range(sizes.rounds):
        start = time.perf_counter()
        jax.block_until_ready([run() for _ in range(sizes.calls)])
        spent.append((time.perf_counter() - start) / sizes.calls)
    return 1e3 * statistics.median(spent)


def example(case: Case) -> tuple[jax.Array, ...]:
    """Value, locations, weights and cotangent. No point lies within a twentieth of a cell of a cell's centre, where a
    gradient jumps and rounding chooses the side; about a tenth lie outside their level."""
    rng = np.random.default_rng(0)
    value, locations, weights, cotangent = (np.empty(x.shape, np.float32) for x in case.arguments(1))
    for level, (height, width) in enumerate(case.levels):
        for axis, cells in enumerate((width, height)):
            shape = locations.shape[:3] + locations.shape[4:5]
            first = rng.integers(-1 - cells // 10, cells + cells // 10, shape)
            locations[:, :, :, level, :, axis] = (first + rng.uniform(0.05, 0.95, shape) + 0.5) / cells
    for array in (value, cotangent):
        array[...] = rng.standard_normal(array.shape)
    weights[...] = rng.uniform(size=weights.shape)
    return (
        jnp.asarray(value, case.dtype),
        jnp.asarray(locations),
        jnp.asarray(weights / weights.sum((-1, -2), keepdims=True)),
        jnp.asarray(cotangent, case.dtype),
    )


def check_kernels(sizes: Sizes) -> Iterator[Row]:
    """The largest error of each result, over the result's largest number, against the definition in float64."""
    for case in sizes.checked:
        arguments = example(case)
        program = jax.jit(kernels(case.levels)[1]).lower(*arguments).compile()
        found = program(*arguments)
        with jax.enable_x64(True):
            wide = [jnp.asarray(array, jnp.float64) for array in arguments]

            def exact(value, locations, weights, cotangent, levels=case.levels):
                out, pull = jax.vjp(
                    lambda v, x, a: reference.deformable_attention(v, levels, x, a), value, locations, weights
                )
                return out, *pull(cotangent)

            wanted = jax.jit(exact)(*wide)
            assert wanted[0].dtype == jnp.float64
            errors = [
                float(jnp.abs(jnp.asarray(got, jnp.float64) - want).max() / jnp.abs(want).max())
                for got, want in zip(found, wanted, strict=True)
            ]
        names = ("forward", "∂value", "∂locations", "∂weights")
        yield {"use": case.name, "dtype": jnp.dtype(case.dtype).name} | {
            **{name: f"{error:.1e}" for name, error in zip(names, errors, strict=True)},
            "kernels": str(count(program, KERNEL)),
        }


def floor(case: Case, backward: bool) -> float | None:
    """Milliseconds that no form can beat: every array read or written once, or the operations on what is read."""
    known = rates()
    if known is None:
        return None
    value, locations, weights, out = (math.prod(x.shape) * x.dtype.itemsize for x in case.arguments(1))
    reads = math.prod(case.arguments(1)[2].shape) * case.arguments(1)[0].shape[-1] * 4  # of one number of one cell
    size = value + locations + weights + out
    operations = 2 * reads
    if backward:
        size += value + locations + weights + out + value  # the same read again, and the three gradients
        operations += 4 * reads
    return 1e3 * max(size / known[0], operations / known[2])


def time_kernels(sizes: Sizes) -> Iterator[Row]:
    for case in sizes.timed:
        arguments = example(case)
        for part, (ours, theirs) in enumerate(zip(kernels(case.levels), plain(case.levels), strict=True)):
            given = arguments if part else arguments[:3]
            mine, xla = (milliseconds(partial(jax.jit(form), *given), sizes) for form in (ours, theirs))
            least = floor(case, bool(part))
            yield {
                "use": case.name,
                "dtype": jnp.dtype(case.dtype).name,
                "part": "with gradients" if part else "forward",
                "kernels, ms": f"{mine:.3f}",
                "XLA's form, ms": f"{xla:.3f}",
                "ratio": f"{xla / mine:.1f}",
                "floor, ms": "–" if least is None else f"{least:.3f}",
            }


def pictures(config: Config, number: int) -> Images:
    height, width = largest_bucket(config)
    pixels = np.random.default_rng(0).integers(0, 256, (number, height, width, 3), dtype=np.uint8)
    return Images(pixels, np.ones((number, height, width), bool))


def batch_of(config: Config, number: int) -> Batch:
    """Random pictures of the largest bucket, half of the slots for objects filled."""
    rng, data = np.random.default_rng(1), config.data
    slots = (number, data.max_objects)
    texts = rng.standard_normal((*slots, config.model.text_width), np.float32)
    tokens = np.zeros((*slots, data.max_name_tokens), np.int32)
    tokens[..., :3] = 5, 6, 1
    boxes = np.concatenate([rng.uniform(0.3, 0.7, (*slots, 2)), rng.uniform(0.1, 0.5, (*slots, 2))], -1)
    return Batch(
        pictures(config, number),
        Objects(
            boxes=boxes.astype(np.float32),
            valid=np.broadcast_to(np.arange(data.max_objects) < (data.max_objects + 1) // 2, slots).copy(),
            texts=texts / np.linalg.norm(texts, axis=-1, keepdims=True),
            tokens=tokens,
        ),
    )


def time_training(sizes: Sizes) -> Iterator[Row]:
    config = sizes.config()
    height, width = largest_bucket(config)
    mesh = make_mesh(config.mesh)
    model, optimizer = OpenDet(config.model, config.ablation), make_optimizer(config.optimizer, config.ablation)
    for number in sizes.batches:
        batch = place_batch(batch_of(config, number), mesh)
        state = [fresh_state(jax.jit(partial(init_params, model))(jax.random.key(0)), optimizer, config)]
        start = time.perf_counter()
        with jax.set_mesh(mesh):
            traced = jit_step(make_train_step(model, optimizer, config), state[0], mesh).trace(state[0], batch)
            program = traced.lower().compile()
        compiled = time.perf_counter() - start

        def step(program=program, state=state, batch=batch):
            state[0], terms = program(state[0], batch)
            return terms["total"]

        spent = milliseconds(step, sizes)
        assert np.isfinite(float(step()))
        planned = program.memory_analysis()
        arguments = planned.argument_size_in_bytes + planned.output_size_in_bytes - planned.alias_size_in_bytes
        used = jax.devices()[0].memory_stats() or {}
        known = rates()
        least = None if known is None else 1e3 * products(traced.jaxpr) / known[1]
        yield {
            "batch": f"{number} × {height}×{width}",
            "step, ms": f"{spent:.1f}",
            "images/s": f"{1e3 * number / spent:.2f}",
            "memory planned, GiB": f"{(arguments + planned.temp_size_in_bytes) / 2**30:.2f}",
            "peak so far, GiB": f"{used['peak_bytes_in_use'] / 2**30:.2f}" if "peak_bytes_in_use" in used else "–",
            "floor of the products, ms": "–" if least is None else f"{least:.1f}",
            "compile, s": f"{compiled:.0f}",
        }
        del step, program, state, batch, traced  # before the next state takes memory, too


def time_inference(sizes: Sizes) -> Iterator[Row]:
    config = sizes.config()
    height, width = largest_bucket(config)
    model = OpenDet(config.model, config.ablation)
    params = jax.jit(partial(init_params, model))(jax.random.key(0))
    inference = Inference(model, params, config, decode=str)
    nothing = Selection(max_detections=0, min_score=0.0, nms_iou=0.9)
    for number in sizes.batches:
        images, shapes = pictures(config, number), [(height, width)] * number
        spent = milliseconds(lambda images=images, shapes=shapes: inference(images, shapes, nothing), sizes)
        yield {
            "work": f"detection, {number} × {height}×{width}",
            "ms": f"{spent:.1f}",
            "a second": f"{1e3 * number / spent:.1f}",
        }
    for number in sizes.prompts:
        prompts = np.random.default_rng(0).standard_normal((number, config.model.text_width), np.float32)
        spent = milliseconds(lambda prompts=prompts: inference.name(prompts)[1], sizes)
        yield {
            "work": f"naming, {number} prompts, {config.eval.num_beams} beams, {config.eval.max_new_tokens} tokens",
            "ms": f"{spent:.1f}",
            "a second": f"{1e3 * number / spent:.1f}",
        }


PARTS: dict[str, Callable[[Sizes], Iterator[Row]]] = {
    "kernels": check_kernels,
    "times": time_kernels,
    "training": time_training,
    "inference": time_inference,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--tiny", action="store_true", help="sizes that run on a CPU in seconds")
    arguments = parser.parse_args()
    enable_cache()
    device = jax.devices()[0]
    print(json.dumps({"platform": device.platform, "device": device.device_kind, "jax": jax.__version__}), flush=True)
    if device.platform != "gpu" and not arguments.tiny:
        return
    for row in PARTS[arguments.part](TINY if arguments.tiny else FULL):
        print(json.dumps(row, ensure_ascii=False), flush=True)


if __name__ == "__main__":
    main()
