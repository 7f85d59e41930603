"""The real program around a model of three layers, which compiles in a second instead of a minute.

Loop, data, optimizer, checkpoints, logs and command line are the program's own. Run as a module it takes the command
line of opendet_jax.main, and of these environment variables:
  TOY_POISON=3        the boxes of the 3rd batch are not numbers
  TOY_SLEEP=0.2       seconds that each batch takes to make
  TOY_EVALUATION=60   seconds that an evaluation takes
  TOY_COMPILE=step    "init", "step" or "evaluation" takes the compiler half an hour, in which Python hears no signal
"""

import hashlib
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from opendet_jax.batch import Batch
from opendet_jax.data.pipeline import TrainingBatch, TrainingSource

BLOCK, HIDDEN = 8, 16  # pixels a side; neurons
MAX_OBJECTS, WORDS = 3, 384

original_batch = TrainingSource.__getitem__


def init_params(_model: Any, key: jax.Array) -> dict[str, Any]:
    """One layer of each of the optimizer's groups."""

    def layer(index: int, *shape: int) -> jax.Array:
        return 0.1 * jax.random.normal(jax.random.fold_in(key, index), shape)

    return {
        "backbone": {"kernel": layer(0, 3 * (32 // BLOCK) ** 2, HIDDEN)},
        "decoder": {"kernel": layer(1, HIDDEN, 4 * MAX_OBJECTS), "bias": jnp.zeros(4 * MAX_OBJECTS)},
        "name_generator": {"t5": {"lm_head": {"kernel": layer(2, HIDDEN, WORDS)}}},
    }


def compile_for_long(what: str) -> None:
    if os.environ.get("TOY_COMPILE") == what:
        print(f"compiling {what}", file=sys.stderr, flush=True)
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # in C


def compiled_params(model: Any, key: jax.Array) -> dict[str, Any]:
    compile_for_long("init")
    return init_params(model, key)


def loss_function(_model: Any, _config: Any) -> Callable[..., tuple[jax.Array, dict[str, jax.Array]]]:
    """(params, batch, key) → (total, terms), with dropout drawn from the key."""

    def loss(params, batch: Batch, key):
        compile_for_long("step")
        pixels = jnp.asarray(batch.images.pixels, jnp.float32) / 255
        blocks = pixels.reshape(len(pixels), 32 // BLOCK, BLOCK, 32 // BLOCK, BLOCK, 3).mean((2, 4))
        hidden = jnp.tanh(blocks.reshape(len(pixels), -1) @ params["backbone"]["kernel"])
        hidden = hidden * jax.random.bernoulli(key, 0.8, hidden.shape)
        boxes = jax.nn.sigmoid(hidden @ params["decoder"]["kernel"] + params["decoder"]["bias"])
        objects = batch.objects
        valid = jnp.asarray(objects.valid)
        error = jnp.square(boxes.reshape(objects.boxes.shape) - objects.boxes).sum(-1)
        l1 = jnp.where(valid, error, 0).sum() / valid.sum()
        words = jax.nn.log_softmax(hidden @ params["name_generator"]["t5"]["lm_head"]["kernel"])
        naming = -jnp.take_along_axis(words, objects.tokens[:, 0, :1], axis=1).mean()
        return l1 + naming, {"total": l1 + naming, "l1/layer_1": l1, "naming": naming}

    return loss


def evaluate(inference: Any, _dataset: Any, _config: Any, _workdir: Any, step: int, _naming: Any) -> dict[str, Any]:
    """AP is best at step 7 of the first twelve."""
    compile_for_long("evaluation")
    end = time.monotonic() + float(os.environ.get("TOY_EVALUATION", "0"))
    while time.monotonic() < end:
        time.sleep(0.01)
    return {"step": step, "name_mapping": "exact", "AP": float(5 * step % 12), "APr": None, "rising": float(step)}


def batch_of_step(source: TrainingSource, step: int) -> TrainingBatch:
    if seconds := float(os.environ.get("TOY_SLEEP", "0")):
        print(f"making batch {step + 1}", file=sys.stderr, flush=True)
        time.sleep(seconds)
    made = original_batch(source, step)
    if step + 1 != int(os.environ.get("TOY_POISON", "0")):
        return made
    objects = made.batch.objects
    return replace(made, batch=replace(made.batch, objects=replace(objects, boxes=np.full_like(objects.boxes, np.nan))))


def install(put: Callable[[Any, str, Any], None]) -> None:
    """Puts the small model into the program's place of the large one by `put(module, name, value)`."""
    from opendet_jax.train import optimizer, run, step

    put(step, "loss_function", loss_function)
    put(run, "init_params", compiled_params)
    put(run, "evaluate", evaluate)
    put(optimizer, "init_params", init_params)
    put(TrainingSource, "__getitem__", batch_of_step)


if __name__ == "__main__":
    from absl import app

    from opendet_jax import main

    install(setattr)
    app.run(main.main, flags_parser=main.parse_flags)
