"""The training loop: evaluate → checkpoint → next batch → step → log.

Evaluation and checkpoints come before the next batch is drawn, so that a checkpoint holds the iterator's state of
exactly the batches that its parameters have seen.
"""

import math
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import logging
from tqdm import tqdm

from opendet_jax.config import Config
from opendet_jax.data.pipeline import load_datasets, training_stream
from opendet_jax.data.records import Dataset
from opendet_jax.data.text_embeddings import make_embedder
from opendet_jax.data.tokenizer import load_tokenizer
from opendet_jax.errors import InputError
from opendet_jax.evaluate.loop import evaluate
from opendet_jax.files import write_json
from opendet_jax.inference import Inference
from opendet_jax.model.opendet import OpenDet, init_params
from opendet_jax.train.checkpoint import Checkpoints
from opendet_jax.train.curves import draw_curves
from opendet_jax.train.metrics import MetricsLog
from opendet_jax.train.optimizer import make_optimizer
from opendet_jax.train.sharding import by_example, data_mesh, replicated
from opendet_jax.train.state import TrainState
from opendet_jax.train.step import make_train_step
from opendet_jax.weights.init import describe, initialise


class NonFiniteLossError(InputError):
    """A loss term that is not a finite number."""


def initial_state(model: OpenDet, optimizer, config: Config, sharding) -> TrainState:
    """Parameters from `train.seed` and what `config.init` names, on every device."""
    params = initialise(jax.jit(partial(init_params, model))(jax.random.key(config.train.seed)), config)

    def make(params) -> TrainState:
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    return jax.jit(make, out_shardings=sharding, donate_argnums=0)(params)


def train(config: Config, workdir: Path) -> None:
    """Trains to `train.steps`, continuing from the workdir's newest checkpoint, and evaluates the result."""
    workdir.mkdir(parents=True, exist_ok=True)
    train_set, eval_set = load_datasets(config, workdir)
    tokenizer = load_tokenizer(config.data.tokenizer, config.model.t5.vocab_size)
    embedder = make_embedder(config.data, config.model.text_width)
    batches = iter(training_stream(train_set, config.data, tokenizer, embedder, config.train.seed))
    mesh = data_mesh()
    model = OpenDet(config.model, config.ablation)
    optimizer = make_optimizer(config.optimizer, config.ablation)
    state = initial_state(model, optimizer, config, replicated(mesh))
    checkpoints = Checkpoints(workdir, config, config.train.keep_checkpoints)
    if checkpoints.newest is not None:
        state, iterator_state = checkpoints.restore(state, checkpoints.newest)
        batches.set_state(iterator_state)
        print(f"continuing from step {int(state.step)} of {workdir}")
    else:
        print(describe(config))
    write_json(workdir / "config.json", config.to_dict())
    count = sum(x.size for x in jax.tree.leaves(state.params))
    print(f"{config.name}: {count / 1e6:.2f} M parameters, {len(train_set.records)} training images")
    inference = Inference(model, state.params, config, tokenizer.decode)

    step_function = jax.jit(make_train_step(model, optimizer, config), donate_argnums=0)
    first = int(state.step)
    log = MetricsLog(workdir, first)
    bar = tqdm(total=config.train.steps, initial=first, unit="step", dynamic_ncols=True, mininterval=1.0)
    started, logged = time.monotonic(), first
    for step in range(first, config.train.steps):
        if _due(step, config.train.eval_every, first):
            _evaluate(inference, state, eval_set, config, workdir)
        if _due(step, config.train.checkpoint_every, first):
            checkpoints.save(state, batches.get_state())
        example = next(batches)
        state, terms = step_function(state, jax.device_put(example.batch, by_example(mesh)))
        done, last = step + 1, step + 1 == config.train.steps
        if last or (config.train.log_every and done % config.train.log_every == 0):
            values = {name: float(value) for name, value in jax.device_get(terms).items()}
            _require_finite(values, done, example.image_ids)
            log.write(done, values)
            now = time.monotonic()
            rate = (done - logged) * config.data.batch_size / (now - started)
            started, logged = now, done
            bar.set_postfix_str(f"loss {values['total']:.3f}, {rate:.1f} images/s")
        bar.update()
    bar.close()
    checkpoints.save(state, batches.get_state())
    checkpoints.close()
    log.close()
    draw_curves(workdir / "metrics.jsonl", workdir / "curves.png")
    _evaluate(inference, state, eval_set, config, workdir)


def _due(step: int, every: int, first: int) -> bool:
    return bool(every) and step > first and step % every == 0


def _evaluate(inference: Inference, state: TrainState, eval_set: Dataset, config: Config, workdir: Path) -> None:
    inference.params = state.params
    evaluate(inference, eval_set, config, workdir, int(state.step))


def _require_finite(values: dict[str, float], step: int, image_ids) -> None:
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    if bad:
        logging.error("images of the batch: %s", image_ids.tolist())
        raise NonFiniteLossError(f"step {step}: {', '.join(bad)} not finite; images {image_ids.tolist()}")
