"""One run of the protocol: training, AP over steps, and what measure.py says of the model that it ends with.

`opendet_jax.train` makes a program for every seed, which is part of its config. Here the seed is an argument: the six
runs of an arm share their programs. Losses, optimizer, data and evaluation are those of opendet_jax.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import serialization
from flax.traverse_util import flatten_dict, unflatten_dict

from experiments.ablations.arms import (
    EVALUATED,
    FULL,
    SCENES_EVAL,
    SCENES_TRAIN,
    STEPS,
    Arm,
    config_of,
    embedder_of,
    model_of,
    without_seed,
)
from experiments.ablations.measure import Measures
from experiments.ablations.pretrain import load_t5
from opendet_jax.checkpoints.folder import MODELS, read_portable
from opendet_jax.compilation import compiler_options, give_back_memory
from opendet_jax.config import Config, DatasetPaths
from opendet_jax.data.datasets import load_datasets
from opendet_jax.data.pipeline import training_stream
from opendet_jax.data.scenes import generate
from opendet_jax.data.tokenizer import load_tokenizer
from opendet_jax.errors import InputError
from opendet_jax.evaluate.loop import evaluate
from opendet_jax.files import replacing
from opendet_jax.inference import Inference
from opendet_jax.model.opendet import OpenDet, init_params
from opendet_jax.train.optimizer import TrainState, fresh_state, make_optimizer
from opendet_jax.train.step import loss_function

EVALUATION_SEED = 1000  # added to that of the training scenes
LOGGED = ("total", "naming")  # terms that are kept of every step
STATE = "state.msgpack"  # of a run that was stopped


class DivergedError(InputError):
    """A loss that is not a number."""


class Programs:
    """What is compiled once for all seeds of an arm."""

    def __init__(self, arm: Arm):
        self.arm, self.config = arm, without_seed(config_of(arm, 0))
        self.model = model_of(arm, self.config)
        self.optimizer = make_optimizer(self.config.optimizer, self.config.ablation)
        self.tokenizer = load_tokenizer(self.config.data.tokenizer, self.config.model.t5.vocab_size)
        self.embedder = embedder_of(arm, self.config.model.text_width)
        self.init = jax.jit(partial(init_params, self.model))
        self.take = jax.jit(
            make_step(self.model, self.optimizer, self.config),
            donate_argnums=0,
            compiler_options=compiler_options(jax.default_backend(), trains=True),
        )
        self.inference = Inference(self.model, None, self.config, self.tokenizer.decode)
        self.measures = Measures(self.inference, self.config, self.embedder)

    def start(self, seed: int) -> TrainState:
        """The parameters that the seed gives, with the pre-trained Swin and T5 in their midst."""
        params = flatten_dict(jax.device_get(self.init(jax.random.key(seed))))
        found = {"backbone": load_backbone(), "name_generator": {"t5": load_t5()}}
        trained = flatten_dict(found)
        wrong = [path for path, value in trained.items() if path not in params or params[path].shape != value.shape]
        if wrong:
            raise InputError(f"what is pre-trained is of another size than the config's, at {'/'.join(wrong[0])}")
        return fresh_state(unflatten_dict(params | trained), self.optimizer, self.config)


def load_backbone() -> dict[str, Any]:
    """Of the model that comes with opendet_jax."""
    _, params, _ = read_portable(MODELS / "scenes_tiny")
    return params["backbone"]


def make_step(model: OpenDet, optimizer: optax.GradientTransformation, config: Config) -> Callable[..., Any]:
    """As opendet_jax.train.step has it, with the key of all randomness as an argument."""
    gradient = jax.value_and_grad(loss_function(model, config), has_aux=True)

    def step(state: TrainState, batch, key) -> tuple[TrainState, dict[str, Any]]:
        (_, terms), grads = gradient(state.params, batch, jax.random.fold_in(key, state.step))
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        state = state.replace(step=state.step + 1, params=params, opt_state=opt_state)
        return state, {name: terms[name] for name in LOGGED}

    return step


def run(programs: Programs, seed: int, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """The result of a run, as its json has it. What is in `folder` of a run that was stopped is gone on from.

    Raises DivergedError.
    """
    clock = Clock()
    config = with_scenes(config_of(programs.arm, seed), folder.parent / "scenes")
    mixture, evaluated = load_datasets(config, folder)
    batches = iter(training_stream(mixture, config.data, programs.tokenizer, programs.embedder, seed))
    state, key = programs.start(seed), jax.random.key(seed)
    kept: dict[str, Any] = {"curve": [], **{name: [] for name in LOGGED}, "seconds": [0.0, 0.0], "restarts": 0}
    if (folder / STATE).is_file():
        saved = serialization.msgpack_restore((folder / STATE).read_bytes())
        state = serialization.from_state_dict(state, saved["state"])
        batches.set_state(saved["position"])
        kept = saved["kept"]
        kept["restarts"] += 1
        clock = Clock(*kept["seconds"])
    terms: list[Any] = []
    for step in range(int(state.step) + 1, STEPS + 1):
        state, found = programs.take(state, next(batches).batch, key)
        terms.append(found)
        if len(terms) == 1:
            jax.block_until_ready(found)
            give_back_memory()  # what compiling has used
        if step not in EVALUATED:
            continue
        for name in LOGGED:
            kept[name] += [round(float(term[name]), 4) for term in jax.device_get(terms)]
        terms = []
        if not np.isfinite(kept["total"]).all():
            raise DivergedError(f"{config.name}: a loss of the steps up to {step} is not a number")
        programs.inference.params = state.params
        metrics = evaluate(programs.inference, evaluated, config, folder, step)
        kept["curve"].append({"step": step, **{name: v for name, v in metrics.items() if isinstance(v, float)}})
        say(f"{config.name}: step {step}, AP {100 * metrics['AP']:.1f}, {clock.minutes():.1f} minutes so far")
        kept["seconds"] = clock.seconds()
        if step < STEPS:
            content = {"state": serialization.to_state_dict(state), "position": batches.get_state(), "kept": kept}
            with replacing(folder / STATE) as part:
                part.write_bytes(serialization.msgpack_serialize(jax.device_get(content)))
    opposing_on = mixture if programs.arm.name == FULL else None
    measured = programs.measures(jax.device_get(state.params), evaluated, opposing_on)
    (folder / STATE).unlink(missing_ok=True)
    wall, cpu = clock.seconds()
    del kept["seconds"]
    return {"minutes": round(wall / 60, 2), "cpu_minutes": round(cpu / 60, 2), **kept, **measured}


def with_scenes(config: Config, folder: Path) -> Config:
    """With scenes of the seed: others to train on, and others to evaluate on, for every seed."""
    seed, size = config.train.seed, config.data.scenes_size
    train = generate(folder, SCENES_TRAIN, seed, size, "train", progress=False)
    val = generate(folder, SCENES_EVAL, EVALUATION_SEED + seed, size, "val", frequencies_from=train, progress=False)
    paths = [DatasetPaths(str(annotations), str(annotations.parent / "images")) for annotations in (train, val)]
    return replace(config, data=replace(config.data, source="json", train=paths[0], eval=paths[1]))


class Clock:
    """Wall-clock and CPU time of this process, with what an earlier one spent on the run."""

    def __init__(self, wall: float = 0.0, cpu: float = 0.0):
        self._wall, self._cpu = time.monotonic() - wall, time.process_time() - cpu

    def seconds(self) -> list[float]:
        return [time.monotonic() - self._wall, time.process_time() - self._cpu]

    def minutes(self) -> float:
        return self.seconds()[0] / 60
