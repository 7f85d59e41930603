"""The authors' training run, taken with our step: their weights, batches and random numbers.

`python -m tests.parity.trajectory FILE OUT RUN:STEPS …` writes what came of it: a process of its own, because it takes
gigabytes. `python -m tests.parity.float64 tests.parity.trajectory FILE OUT RUN:STEPS …` does so in float64.
"""

from argparse import ArgumentParser
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict
from jax.tree_util import tree_leaves_with_path

from opendet_jax.batch import Batch
from opendet_jax.compilation import enable_cache, give_back_memory
from opendet_jax.config import Config, OptimizerConfig
from opendet_jax.losses import total as total_module
from opendet_jax.losses.matching import ONE_TO_MANY, ONE_TO_ONE
from opendet_jax.losses.naming import TextNoise
from opendet_jax.model.denoising import DenoisingRandoms, denoising_slots
from opendet_jax.model.opendet import OpenDet
from opendet_jax.parallel.mesh import make_mesh
from opendet_jax.parallel.sharding import partition
from opendet_jax.train import optimizer as optimizer_module
from opendet_jax.train import step as step_module
from opendet_jax.train.optimizer import TrainState, fresh_state
from opendet_jax.weights.open_det import OPENDET_RULES
from opendet_jax.weights.rules import WHOLE
from tests.parity.kinks import Kinks, nearest_to_kinks, sides, watched, with_sides
from tests.parity.step import CONFIG, LOSSES, SPARE_SLOTS, program_objects, with_spare
from tests.parity.test_detector import images_of, noise
from tests.parity.vectors import Vectors, params_of

LABELS = 91  # of the program's random labels
SETS = {ONE_TO_MANY: ("layer_1", "layer_2", "layer_3", "layer_4"), ONE_TO_ONE: ("layer_5", "layer_6", "encoder")}


class Given(NamedTuple):
    """What a step is given in the place of what it draws, and the rate, so that runs share one program."""

    batch: Batch
    boxes: DenoisingRandoms
    texts: TextNoise
    rate: np.ndarray  # with the axis of images, as all of a batch
    kinks: Kinks | None = None  # units and points that have the sides of float64


def runs(vectors: Vectors) -> list[str]:
    """Their names in the file."""
    found = [
        key.removesuffix("/rate") for key in vectors.arrays if key.endswith("/rate") and not key.startswith("meta/")
    ]
    assert found, f"{vectors.name}: no run"
    return found


def dtype_of_floats() -> Any:
    """float32, or under `tests.parity.float64` float64: the name."""
    return jnp.dtype(jnp.float32).name


def in_floats(x: Any) -> Any:
    return x.astype(dtype_of_floats()) if jnp.issubdtype(x.dtype, jnp.floating) else x


def config_of(vectors: Vectors) -> Config:
    """No dropout, everything trains; learning rates are relative to that of a run."""
    rate = dict(zip(vectors["meta/rate_groups"], vectors["meta/rate_factors"], strict=True))
    return Config(
        model=replace(
            CONFIG,
            backbone=replace(CONFIG.backbone, drop_path_rate=0.0),
            t5=replace(CONFIG.t5, dropout=0.0),
            denoising_queries=int(vectors["meta/denoising"]),
            dtype=dtype_of_floats(),
            distiller_dropout=0.0,
            prompt_dropout=0.0,
            generator_dropout=0.0,
        ),
        loss=replace(LOSSES, name_mask_threshold=0.999),
        optimizer=OptimizerConfig(
            detector_rate=float(rate["rest"]),
            backbone_rate=float(rate["backbone"]),
            generator_rate=float(rate["class_generate"]),
            weight_decay=float(vectors["meta/weight_decay"]),
            clip_norm=float(vectors["meta/clip_norm"]),
            freeze_head_steps=0,
            freeze_embedding_steps=0,
        ),
    )


def drawn(vectors: Vectors, step: int, batch: Vectors) -> dict[str, np.ndarray]:
    """The random numbers of step 1, 2, …, in the order in which the program drew them."""
    counts, width = batch["objects/count"], batch["objects/texts"].shape[-1]
    most = int(counts.max())
    number = 2 * max(1, int(vectors["meta/denoising"]) // (2 * most)) * int(counts.sum())
    source = np.random.Generator(np.random.PCG64(int(vectors["meta/seed"]) + step))
    return {
        "u_flip": source.random(number).astype(np.float32),
        "new_label": source.integers(0, LABELS, number),
        "sign": 2 * source.integers(0, 2, (number, 4)) - 1,
        "u_box": source.random((number, 4)).astype(np.float32),
        "normal": source.standard_normal((len(counts), most, width)).astype(np.float32),
        "uniform": source.random((len(counts), most, width)).astype(np.float32),
    }


def given(vectors: Vectors, run: str, step: int, course: Mapping[str, np.ndarray] | None = None) -> Given:
    """Batch and random numbers of step 1, 2, …; all batches in as many places as the largest needs.

    `course`: what came of these steps in float64, whose sides of kinks are taken.
    """
    batches = vectors.cases("batch_")
    places = max(vectors[f"batch_{b}/objects/boxes"].shape[1] for b in batches) + SPARE_SLOTS
    batch = vectors.within(f"batch_{(step - 1) % len(batches)}/")
    numbers = drawn(vectors, step, batch)
    slots = denoising_slots(config_of(vectors).model, places)
    found = Given(
        batch=Batch(images_of(batch), program_objects(batch, places)),
        boxes=noise({f"/{name}": x for name, x in numbers.items()}, "", batch["objects/count"], slots),
        texts=TextNoise(*(jnp.asarray(with_spare(numbers[name], places, 0.0)) for name in ("normal", "uniform"))),
        rate=np.full(len(batch["objects/count"]), vectors[f"{run}/rate"]),
        kinks=None if course is None else sides_of(course, f"{run}/{step}/kinks/"),
    )
    return jax.tree.map(in_floats, found)


def sides_of(course: Mapping[str, np.ndarray], start: str) -> Kinks:
    names = {key.removeprefix(start).rsplit("/", 1)[0] for key in course if key.startswith(start)}
    return {name: sides(name, *(course[f"{start}{name}/{i}"] for i in range(3))) for name in sorted(names)}


def noticing_norms(optimizer: optax.GradientTransformationExtraArgs) -> optax.GradientTransformationExtraArgs:
    """`optimizer`, whose state holds the norms of the rows of each last gradient, too."""

    def norms(gradients):
        return [jnp.linalg.norm(g.reshape(-1, g.shape[-1]), axis=-1) for g in jax.tree.leaves(gradients)]

    def init(params):
        return norms(params), optimizer.init(params)

    def update(gradients, state, params=None, **extra):
        updates, inner = optimizer.update(gradients, state[1], params, **extra)
        return updates, (norms(gradients), inner)

    return optax.GradientTransformationExtraArgs(init, update)


class Trainer:
    """Our training step, jitted as training has it, with the random numbers of a file."""

    def __init__(self, vectors: Vectors, course: Mapping[str, np.ndarray] | None = None, notes_kinks: bool = False):
        self.vectors, self.course, self.notes_kinks, self.config = vectors, course, notes_kinks, config_of(vectors)
        self.start = jax.tree.map(in_floats, params_of(vectors))
        self.mesh = make_mesh(self.config.mesh, jax.devices()[:1])
        state = jax.eval_shape(self._fresh, self.start)
        with jax.set_mesh(self.mesh):
            first = given(vectors, runs(vectors)[0], 1, course)
            self.take = step_module.jit_step(self._step, state, self.mesh).lower(state, first).compile()
        give_back_memory()

    def _optimizer(self) -> optax.GradientTransformationExtraArgs:
        return noticing_norms(optimizer_module.make_optimizer(self.config.optimizer, self.config.ablation))

    def _fresh(self, params) -> TrainState:
        return fresh_state(params, self._optimizer(), self.config)

    def _step(self, state: TrainState, given: Given) -> tuple[TrainState, dict[str, Any]]:
        training_losses, match, rate_of = step_module.training_losses, total_module.match, optimizer_module._rate
        matches, found = {}, {}

        def nearest(name, x, scale):
            if given.kinks is not None:
                return with_sides(x, *given.kinks[name])
            if self.notes_kinks:
                found[name] = nearest_to_kinks(name, x, scale)
            return x

        def losses(training, *arguments):
            total, terms = training_losses(training, *arguments)
            terms |= {f"kinks/{name}/{i}": x for name, of in found.items() for i, x in enumerate(of)}
            decisions = {f"match/{name}": matches[m].object[i] for m in SETS for i, name in enumerate(SETS[m])}
            queries = training.queries
            decisions |= {"index": queries.index, "valid": queries.valid, "objectness": queries.objectness}
            return total, terms | decisions

        def matching(predictions, targets, mode):
            matches[mode] = match(predictions, targets, mode)
            return matches[mode]

        def rate(*arguments, **settings):
            schedule = rate_of(*arguments, **settings)
            return lambda count: given.rate[0] * schedule(count)

        with (
            patch.object(step_module, "draw_randoms", lambda *arguments: given.boxes),
            patch.object(step_module, "draw_text_noise", lambda *arguments: given.texts),
            patch.object(step_module, "training_losses", losses),
            patch.object(total_module, "match", matching),
            patch.object(optimizer_module, "_rate", rate),
            watched(nearest),
        ):
            model = OpenDet(self.config.model, self.config.ablation)
            return step_module.make_train_step(model, self._optimizer(), self.config)(state, given.batch)

    def run(self, run: str, steps: int) -> Iterator[dict[str, np.ndarray]]:
        """What there is to know of each step: terms, decisions, gradient norms and, where the file has them, what
        became of the parameters; names are those of the file."""
        state = self._fresh(jax.tree.map(jnp.array, self.start))
        state = jax.device_put(state, partition(state, self.mesh))
        kept = {int(s) for kind in ("f64", "f32") for s in self.vectors[f"{run}/{kind}/params/steps"]}
        for number in range(1, steps + 1):
            with jax.set_mesh(self.mesh):
                state, terms = self.take(state, given(self.vectors, run, number, self.course))
            found = {name: np.asarray(x) for name, x in terms.items()}
            paths = ["/".join(key.key for key in keys) for keys, _ in tree_leaves_with_path(self.start)]
            rows = dict(zip(paths, jax.device_get(state.opt_state[0]), strict=True))
            found |= {f"gradient/{path}": np.linalg.norm(x.astype(np.float64)) for path, x in rows.items()}
            if number in kept:
                found |= parameters(self.vectors, run, self.start, jax.device_get(state.params))
            yield found


def parameters(vectors: Vectors, run: str, start: dict[str, Any], now: dict[str, Any]) -> dict[str, np.ndarray]:
    """norm, change and sample of every tensor, in the file's order, and the whole change of some."""
    start, now, found = flatten_dict(start, sep="/"), flatten_dict(now, sep="/"), {}
    whole = {key.rsplit("/", 1)[1] for key in vectors.arrays if key.startswith(f"{run}/f64/params/of/")}
    norms, changes, samples = [], [], []
    for name in map(str, vectors["params/names"]):
        path, layout, part = OPENDET_RULES.place(name)
        assert path, name
        assert part == WHOLE, name
        after, before = (layout.theirs(np.asarray(x[path], np.float64)) for x in (now, start))
        change = after - before
        norms.append(np.linalg.norm(after))
        changes.append(np.linalg.norm(change))
        samples.append(change.reshape(-1)[np.arange(8) * change.size // 8])
        if name in whole:
            found[f"of/{name}"] = change
    found |= {"norm": np.array(norms), "change": np.array(changes), "sample": np.array(samples)}
    return {f"after/{key}": x for key, x in found.items()}


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("vectors", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("steps", nargs="+", metavar="RUN:STEPS")
    parser.add_argument("--kinks", action="store_true", help="note the units and points that are nearest to kinks, too")
    parser.add_argument("--sides", type=Path, help="an OUT of --kinks in float64, whose sides are taken")
    options = parser.parse_args()
    enable_cache()
    course = dict(np.load(options.sides)) if options.sides else None
    trainer, found = Trainer(Vectors(options.vectors), course, options.kinks), {}
    for run, count in (step.split(":") for step in options.steps):
        for number, values in enumerate(trainer.run(run, int(count)), 1):
            found |= {f"{run}/{number}/{name}": x for name, x in values.items()}
    np.savez(options.out, **found)


if __name__ == "__main__":
    main()
