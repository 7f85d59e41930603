"""A training run at work: what it holds, and what can be done with it. training_loop.py does it in order."""

import shlex
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
from absl import logging
from jax.sharding import Mesh
from tqdm import tqdm

from opendet_jax.checkpoints import intact
from opendet_jax.checkpoints.folder import CHECKPOINTS, read_config
from opendet_jax.checkpoints.same_config import CheckpointError, check_began, check_same
from opendet_jax.compilation import give_back_memory
from opendet_jax.config import Config, InitConfig, TrainConfig, config_hash
from opendet_jax.config_files import METRICS
from opendet_jax.data.datasets import load_datasets
from opendet_jax.data.formats.records import Dataset
from opendet_jax.data.images import check_present
from opendet_jax.data.pipeline import training_stream
from opendet_jax.data.text_embeddings import make_embedder
from opendet_jax.data.tokenizer import check_names, load_tokenizer
from opendet_jax.errors import InputError
from opendet_jax.evaluate.evaluator import Evaluator
from opendet_jax.evaluate.loop import check_evaluated, evaluate, load_naming, results_folder
from opendet_jax.evaluate.truth import lvis_truth
from opendet_jax.files import write_json
from opendet_jax.inference import Inference
from opendet_jax.model.opendet import OpenDet, init_params
from opendet_jax.parallel.mesh import (
    check_batch,
    describe_mesh,
    local_copy,
    local_mesh,
    make_mesh,
    own_rows,
    place_batch,
)
from opendet_jax.parallel.processes import check_held, exchange, first_process_first, is_first
from opendet_jax.parallel.sharding import partition
from opendet_jax.train.checkpoint import Checkpoints
from opendet_jax.train.finite import REFUSED, Sent, Terms, Watch
from opendet_jax.train.metrics import (
    CURVES,
    EVALUATIONS,
    MetricsLog,
    best_step,
    draw_curves,
    is_evaluated,
    read_metrics,
)
from opendet_jax.train.optimizer import (
    TrainState,
    abstract_state,
    describe_rates,
    fresh_state,
    learning_rates,
    make_optimizer,
)
from opendet_jax.train.replay import replayed_steps
from opendet_jax.train.step import jit_step, make_train_step
from opendet_jax.weights.init import check_start, describe, initialise

# Seconds from one drawing of the curves to the next, and the share of the time that drawing may take.
DRAWN_EVERY, DRAWING = 60, 0.01


def initial_state(model: OpenDet, optimizer, config: Config, mesh: Mesh) -> TrainState:
    """Parameters from `train.seed` and what `config.init` names, where they belong."""
    params = initialise(jax.jit(partial(init_params, model))(jax.random.key(config.train.seed)), config)
    where = partition(abstract_state(model, optimizer, config, mesh), mesh)
    fresh = partial(fresh_state, optimizer=optimizer, config=config)
    return jax.jit(fresh, out_shardings=where)(jax.device_get(params))


def retention(workdir: Path, config: TrainConfig) -> Callable[[list[int]], set[int]]:
    """Which checkpoints stay: the newest, the best by `train.keep_best`, and those that a replay file refers to."""

    def kept(steps: list[int]) -> set[int]:
        best = best_step(workdir, config.keep_best, steps) if config.keep_best else None
        return {*steps[-config.keep_checkpoints :], *replayed_steps(workdir), *([] if best is None else [best])}

    return kept


def check_space(workdir: Path, template: TrainState) -> None:
    """Raises CheckpointError where the disk has no room for one checkpoint."""
    needed = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(template))
    free = shutil.disk_usage(workdir).free
    if free < needed:
        raise CheckpointError(
            f"{workdir}: has {free / 2**20:,.1f} MiB free on its disk, a checkpoint needs {needed / 2**20:,.1f}"
        )


def check_goes_on(config: Config, workdir: Path) -> InitConfig | None:
    """What the run of the workdir began with, which goes on from a checkpoint; None where there is none.

    Raises CheckpointError where it is of another config, or the config names weights to start from that cannot act.
    """
    folder = workdir / CHECKPOINTS
    if not intact.steps(folder):
        return None
    step, _ = intact.newest_intact(folder, ("config",))
    if step is None or not (folder / str(step) / "opt_state").is_dir():
        return config.init  # damaged, or no run: what restores it says so
    saved = read_config(workdir, "opendet")
    check_same(saved, config, folder / str(step))
    check_began(saved, config, folder / str(step))
    return InitConfig(**saved.get("init", {}))


def check_keep_best(metric: str, evaluated: Dataset) -> None:
    """Raises InputError where the evaluation cannot have the metric: of groups, or of a protocol, that the data set
    does not know."""
    if metric in ("", "AP") or metric not in METRICS:  # what no evaluation at all has is refused with the config
        return
    found = Evaluator(lvis_truth(evaluated)).finish().metrics
    # Without detections nothing is named yet; but where there is no object of a kind, none of it will ever be found.
    if metric not in found or (found[metric] is None and not metric.endswith("accuracy")):
        raise InputError(
            f"config.train.keep_best = {metric!r}: is not measured on {evaluated.annotations}, as AP and AP50 are"
        )


def describe_time(seconds: float) -> str:
    """About so long, in the unit that one would say it in."""
    if seconds < 100:
        return f"about {seconds:.0f} s"
    if seconds < 6000:
        return f"about {seconds / 60:.0f} min"
    return f"about {seconds / 3600:.1f} h"


class Run:
    """Begins at step 0, or where the workdir's newest undamaged checkpoint was taken.

    `state` is that after `step` steps, and `position` the data iterator's state from which the next batch is drawn.
    """

    def __init__(self, config: Config, workdir: Path):
        self.config, self.workdir = config, workdir
        self._is_first = is_first()
        # What was given is looked at before anything is compiled, from the quickest to the slowest.
        self._mesh = mesh = make_mesh(config.mesh)
        check_batch(config, mesh)
        try:
            workdir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"{workdir}: cannot be made: {error.strerror}") from error
        tokenizer = load_tokenizer(config.data.tokenizer, config.model.t5.vocab_size)
        embedder = make_embedder(config.data, config.model.text_width, config.eval.text_encoder)
        model, optimizer = OpenDet(config.model, config.ablation), make_optimizer(config.optimizer, config.ablation)
        template = abstract_state(model, optimizer, config, mesh)
        check_space(workdir, template)
        began, given = check_goes_on(config, workdir), config.data
        if began is None:
            check_start(template.params, config)
        else:
            self.config = config = replace(config, init=began)
            given = replace(given, max_unwritable=1.0)  # it has learnt these names so far
        with first_process_first("data"):  # it may have pictures to draw
            mixture, self._eval_set = load_datasets(config, workdir)
        sections = ["data.train", *(f"data.mixture[{i}]" for i in range(len(config.data.mixture)))]
        for part, where in zip(mixture.parts, sections, strict=True):
            check_present(Dataset(part.annotations, part.records, ()), where, config.data.max_unreadable)
        check_names(mixture.records, tokenizer, given, "training")
        check_evaluated(self._eval_set, tokenizer, replace(config, data=given))
        check_keep_best(config.train.keep_best, self._eval_set)
        rows = own_rows(mesh, config.data.batch_size)
        self._batches = iter(training_stream(mixture, config.data, tokenizer, embedder, config.train.seed, rows))
        self._naming = load_naming(self._eval_set, config)
        self.checkpoints = Checkpoints(workdir, config, retention(workdir, config.train))
        restored = self.checkpoints.restore_newest(template)
        if restored:
            self.state, position = restored
            self._batches.set_state(position)
            self._say(f"continuing from step {int(self.state.step)} of {workdir}")
        else:
            self.state = initial_state(model, optimizer, config, mesh)
            self._say(describe(config))
        self.first = self.step = int(self.state.step)
        self.position: dict[str, Any] = self._batches.get_state()
        self.watch = Watch(config.train.non_finite, int(self.state.refused))
        self._take = jit_step(make_train_step(model, optimizer, config), self.state, mesh)
        self._inference = Inference(model, None, config, tokenizer.decode, local_mesh())
        if self._is_first:
            write_json(workdir / "config.json", config.to_dict())
            self._log = MetricsLog(workdir, self.first)
        count = sum(x.size for x in jax.tree.leaves(self.state.params))
        self._say(f"{config.name} ({config_hash(config)}): {count / 1e6:.2f} M parameters, {mixture.describe()}")
        self._say(f"{describe_mesh(config, mesh)}; {describe_rates(config.optimizer)}")
        self._bar = tqdm(disable=True)  # until the first step is done
        self._logged, self._foretold = (self.first, time.monotonic()), False
        self._draws_at = time.monotonic() + DRAWN_EVERY

    def _say(self, text: str) -> None:
        if self._is_first:
            with tqdm.external_write_mode():  # above the bar
                print(text, flush=True)

    def take_step(self) -> Terms:
        """Draws a batch and sends a step on its way; its loss terms. Raises NonFiniteError for the step before it."""
        sent_from = self.position
        batch = next(self._batches)
        first = self.step == self.first
        if first:
            self._say("compiling the training step: minutes the first time, less from the cache of compiled programs")
        called_at = time.monotonic()
        with jax.set_mesh(self._mesh):
            self.state, terms = self._take(self.state, place_batch(batch.batch, self._mesh))
        compiled = time.monotonic() - called_at  # a step itself is sent off without waiting for it
        sent = Sent(self.step, batch, sent_from, terms)
        self.step, self.position = self.step + 1, self._batches.get_state()
        self.watch.add(sent)
        self.checkpoints.check()
        if first:
            self._begin(terms, compiled)
        else:
            self._bar.update()
        return terms

    def _begin(self, terms: Terms, compiled: float) -> None:
        """Waits for the first step, says what it came to after `compiled` seconds, and starts the bar."""
        give_back_memory()
        loss = float(jax.device_get(terms["total"]))
        self._say(f"compiled in {compiled:.0f} s; loss {loss:.3f} at the first step")
        self._open_bar()
        self._bar.set_postfix_str(f"loss {loss:.3f}")

    def _open_bar(self) -> None:
        """From here on: rate and time left are those of steps alone, without compiling and evaluation."""
        self._bar = tqdm(
            total=self.config.train.steps, initial=self.step, unit="step", dynamic_ncols=True, mininterval=1.0,
            disable=not self._is_first,
        )  # fmt: skip
        self._logged = (self.step, time.monotonic())

    def step_back(self, sent: Sent) -> None:
        """To before a step that was refused, and all after it."""
        self.step, self.position = sent.step, sent.iterator_state

    def owes_evaluation(self) -> bool:
        """Whether the run goes on from a step that was to be evaluated, and that was given up or not gone through with.

        Every process calls this.
        """
        train = self.config.train
        if not (self.first and train.eval_every) or self.first % train.eval_every or self.first >= train.steps:
            return False
        return not exchange(self._is_first and is_evaluated(self.workdir, self.first))[0]

    def save(self) -> None:
        """Begins to save a checkpoint, of steps that are known to be good.

        Raises NonFiniteError, SaveError, LockError.
        """
        self.watch.look_at_all()
        if self._is_first:
            check_held(self.workdir)
        self.checkpoints.save(self.state, self.position)

    def log(self, terms: Terms) -> None:
        """Waits for the step and writes its terms. Raises NonFiniteError, LogError."""
        self.watch.look_at_all()
        values: dict[str, float] = {name: float(value) for name, value in jax.device_get(terms).items()}
        refused = values.pop(REFUSED)
        if self.config.train.non_finite == "skip":
            values["skipped"] = refused
        if self._is_first:
            rates = learning_rates(self.config.optimizer, self.step - 1 - int(refused))  # they follow the updates
            self._log.write(self.step, values | {f"learning_rate/{part}": rate for part, rate in rates.items()})
        if time.monotonic() > self._draws_at:
            self.draw_curves()
        (logged, then), now = self._logged, time.monotonic()
        self._logged = (self.step, now)
        if self.step == logged:  # the first one, whose time is that of compiling
            return
        seconds, left = (now - then) / (self.step - logged), self.config.train.steps - self.step
        if left and not self._foretold:
            self._say(f"{seconds:.2f} s a step: {left} steps take {describe_time(left * seconds)}, without evaluations")
        self._foretold = True
        self._bar.set_postfix_str(f"loss {values['total']:.3f}, {self.config.data.batch_size / seconds:.1f} images/s")

    def evaluate(self) -> None:
        """Raises InputError where `train.keep_best` is no metric of the evaluation."""
        self._bar.close()
        self._inference.params = local_copy(self.state.evaluated, self._mesh)
        metrics = evaluate(self._inference, self._eval_set, self.config, self.workdir, self.step, self._naming)
        self._inference.params = None  # whole on every device: no room for it in training
        wanted = self.config.train.keep_best
        if wanted and wanted not in metrics:
            names = ", ".join(name for name, value in metrics.items() if isinstance(value, float))
            raise InputError(f"config.train.keep_best = {wanted!r}: the evaluation has {names}")
        if self._is_first:
            self._log.evaluated(self.step, metrics)
        if self.step < self.config.train.steps:
            self.draw_curves()
            if self.step > self.first:  # else the first step does
                self._open_bar()

    def draw_curves(self) -> None:
        """A picture is not worth the end of a run, nor the reason of one: where it cannot be drawn, that is said."""
        if not self._is_first:
            return
        began = time.monotonic()
        try:
            draw_curves(self.workdir)
        except (OSError, ValueError) as error:  # ValueError: a line of the log that was cut off, say by a full disk
            logging.warning("%s: cannot be drawn: %s", self.workdir / CURVES, error)
        now = time.monotonic()
        self._draws_at = now + max(DRAWN_EVERY, (now - began) / DRAWING)

    def say_best(self) -> None:
        """Which of the checkpoints that are left is the best, if more than one was evaluated."""
        metric = self.config.train.keep_best
        best = best_step(self.workdir, metric, self.checkpoints.steps()) if metric else None
        if best is not None and best != self.step:
            self._say(f"best {metric}: step {best}, kept in {self.checkpoints.folder / str(best)}")

    def say_where(self) -> None:
        """What lies where when all is done, and what comes next."""
        evaluated = results_folder(self.config, self.workdir)
        rows = read_metrics(self.workdir / EVALUATIONS) if self._is_first else []
        precisions = [f"{100 * row['AP']:.1f} after {row['step']} steps" for row in rows if "AP" in row]
        if len(precisions) > 1:
            self._say("AP " + ", ".join(precisions))
        self._say(
            f"finished {self.step} steps. In {self.workdir}:\n"
            f"  {self.checkpoints.folder.name}/{self.step}: the parameters and all that training goes on from\n"
            f"  {CURVES}, metrics.jsonl: every term of the loss, learning rates, norms of gradients and updates\n"
            f"  {evaluated.relative_to(self.workdir)}: metrics, detections and pictures of the evaluation\n"
            f"next: opendet predict PICTURES --workdir={shlex.quote(str(self.workdir))}"
        )

    def close(self) -> None:
        self._bar.close()
        self.draw_curves()
        if self._is_first:
            self._log.close()
