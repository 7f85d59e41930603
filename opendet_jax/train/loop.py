"""The training loop: checkpoint → evaluate → next batch → step → log.

The checkpoint comes before the next batch is drawn, so that it holds the iterator's state of exactly the batches that
its parameters have seen, and before the evaluation, so that nothing that happens there can lose it. Whatever ends the
loop early, the steps it has finished are saved (salvage.py).
"""

from pathlib import Path

from opendet_jax.config import Config
from opendet_jax.processes import is_first
from opendet_jax.train.curves import draw_curves
from opendet_jax.train.metrics import METRICS, LogError
from opendet_jax.train.run import Run
from opendet_jax.train.salvage import salvage
from opendet_jax.train.signals import Stopped, StopSignals


def train(config: Config, workdir: Path) -> None:
    """Trains to `train.steps`, continuing from the workdir's newest checkpoint, and evaluates the result.

    SIGTERM and SIGINT end it early and well: the step is finished, a checkpoint saved.

    Raises:
        InputError: of many kinds; the message says which file, field or step.
    """
    with StopSignals() as signals:
        try:
            run = Run(config, workdir)
            signals.defer()  # to the very end: what saves the run is not interrupted either
        except Stopped as stopped:
            print(f"{stopped.name}: stopped before the first step; there is nothing to save")
            return
        try:
            _to_the_end(run, signals)
        except Stopped as stopped:
            salvage(run, stopped)
            print(f"{stopped.name}: stopped after step {run.step} of {config.train.steps}, which is saved; ", end="")
            print("the same command continues from it")
        except Exception as error:
            salvage(run, error)
            raise
        finally:
            run.close()


def _to_the_end(run: Run, signals: StopSignals) -> None:
    config = run.config.train
    for step in range(run.first, config.steps):
        signals.check()
        evaluates = _due(step, config.eval_every, run.first)
        if evaluates or _due(step, config.checkpoint_every, run.first):
            run.save()
        if evaluates:
            with signals.interrupting():
                run.evaluate()
        terms = run.take_step()
        if _due(step + 1, config.log_every, run.first) or step + 1 == config.steps:
            try:
                run.log(terms)
            except LogError as error:
                signals.fail(error)
    signals.check_last()
    run.save()
    run.checkpoints.wait()
    if is_first():
        draw_curves(run.workdir / METRICS, run.workdir / "curves.png")
    with signals.interrupting():
        run.evaluate()
    run.checkpoints.close()
    run.say_best()


def _due(step: int, every: int, first: int) -> bool:
    return bool(every) and step > first and step % every == 0
