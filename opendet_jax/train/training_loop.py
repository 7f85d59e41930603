"""The training loop: checkpoint → evaluate → next batch → step → log.

The checkpoint comes before the next batch is drawn, so that it holds the iterator's state of exactly the batches that
its parameters have seen, and before the evaluation, so that nothing that happens there can lose it. Whatever ends the
loop early, the steps it has finished are saved (`salvage`).
"""

import sys
import tempfile
from functools import partial
from pathlib import Path

import jax

from opendet_jax.checkpoints import intact
from opendet_jax.checkpoints.folder import CHECKPOINTS
from opendet_jax.checkpoints.same_config import CheckpointError
from opendet_jax.config import Config
from opendet_jax.errors import InputError
from opendet_jax.parallel.processes import LockError, check_held, is_first, only_training, release
from opendet_jax.train.checkpoint import Checkpoints, SaveError
from opendet_jax.train.finite import NonFiniteError, Sent
from opendet_jax.train.metrics import LogError, is_evaluated
from opendet_jax.train.replay import save_batch
from opendet_jax.train.run import Run, check_goes_on
from opendet_jax.train.signals import BEFORE, FailedError, Stopped, StopSignals


def train(config: Config, workdir: Path) -> None:
    """Trains to `train.steps`, continuing from the workdir's newest checkpoint, and evaluates the result.

    SIGTERM and SIGINT end it early and well: the step is finished, a checkpoint saved.

    Raises:
        InputError: of many kinds; the message says which file, field or step.
    """
    said = finished(config, workdir)
    if said:
        if is_first():
            print(said)
        return
    try:
        with StopSignals(partial(release, workdir)) as signals, only_training(workdir):
            _train(config, workdir, signals)
    except Stopped as stopped:  # while the workdir was taken, or the run was made
        release(workdir)
        print(f"{stopped.name}: {BEFORE}")


def _train(config: Config, workdir: Path, signals: StopSignals) -> None:
    run = Run(config, workdir)
    signals.defer()  # to the very end: what saves the run is not interrupted either
    try:
        _to_the_end(run, signals)
    except Stopped as stopped:
        if run.step == 0:
            raise
        salvage(run, stopped)
        print(f"{stopped.name}: {_stopped(run)}")
    except Exception as error:
        salvage(run, error)
        raise
    finally:
        run.close()


def _stopped(run: Run) -> str:
    after = f"stopped after step {run.step} of {run.config.train.steps}, which is saved"
    return f"{after}; the same command continues from it"


def finished(config: Config, workdir: Path) -> str:
    """What there is to say of a run that has taken and evaluated all its steps; nothing of another.

    Raises CheckpointError where it is a run of another config.
    """
    taken = intact.steps(workdir / CHECKPOINTS)
    if not taken or taken[-1] < config.train.steps or not is_evaluated(workdir, taken[-1]):
        return ""
    newest, _ = intact.newest_intact(workdir / CHECKPOINTS)
    if newest is None or newest != taken[-1]:
        return ""
    check_goes_on(config, workdir)
    return (
        f"finished: {workdir} has {newest} of {config.train.steps} steps, evaluated in {workdir}/eval; "
        f"--config.train.steps={2 * newest} goes on to that step, --mode=eval evaluates again, --mode=predict uses it, "
        "another --workdir begins anew"
    )


def _to_the_end(run: Run, signals: StopSignals) -> None:
    config = run.config.train
    if run.owes_evaluation():
        with signals.interrupting():
            run.evaluate()
    for step in range(run.first, config.steps):
        signals.check()
        evaluates = _due(step, config.eval_every, run.first)
        if evaluates or _due(step, config.checkpoint_every, run.first):
            run.save()
        if evaluates:
            with signals.interrupting():
                run.evaluate()
        terms = run.take_step()
        signals.began()
        if _due(step + 1, config.log_every, run.first) or step + 1 == config.steps:
            try:
                run.log(terms)
            except LogError as error:
                signals.fail(error)
    signals.check_last()
    run.save()
    run.checkpoints.wait()
    signals.saved(_stopped(run))
    with signals.interrupting():
        run.evaluate()
    run.checkpoints.close()
    run.say_best()
    run.say_where()


def _due(step: int, every: int, first: int) -> bool:
    return bool(every) and step > first and step % every == 0


def salvage(run: Run, error: BaseException) -> None:
    """Saves the steps that were finished when `error` ended the run; where its own folder cannot be written, elsewhere.

    Returns where nothing is left to say but `error` itself.

    Raises:
        NonFiniteError: a step was not finite; with the file of its batch.
        SaveError: the checkpoint is elsewhere, or could not be saved at all; with the reason of both.
    """
    agreed = isinstance(error, Stopped | NonFiniteError | FailedError)  # all processes are here
    if jax.process_count() > 1 and not agreed:
        return
    if not isinstance(error, NonFiniteError):  # after which all that was sent is refused, too
        try:
            run.watch.look_at_all()
        except NonFiniteError as found:
            error = found
    if isinstance(error, NonFiniteError):
        run.step_back(error.sent)
        explained = NonFiniteError(f"{error}{_save_its_batch(run.workdir, error.sent)}", error.sent)
        _save(run, explained)
        raise NonFiniteError(f"{explained}\nThe steps before it are saved", error.sent) from error
    if run.step == 0:
        return  # nothing was learnt, and another try must not go on from here
    if any(leaf.is_deleted() for leaf in jax.tree.leaves(run.state)):
        print(f"the state after step {run.step} was lost with the step that failed", file=sys.stderr)
        return
    _save(run, error)
    if isinstance(error, Exception):
        print(f"the state after step {run.step} is saved; the same command continues from it", file=sys.stderr)


def _save_its_batch(workdir: Path, sent: Sent) -> str:
    """Saves it, and says what to do with it."""
    try:
        path, image_ids = save_batch(workdir, sent)
    except OSError as failure:
        return f"\nIts batch could not be saved: {failure.strerror or failure}"
    everywhere = f" (of all processes: {image_ids.tolist()})" if jax.process_count() > 1 else ""
    return (
        f"{everywhere}\nIts batch is {path}: "
        f"--mode=replay --config.train.replay={path} shows where it began; "
        "--config.train.non_finite=skip goes on without it"
    )


def _save(run: Run, error: BaseException) -> None:
    """To the run's folder, or else to a new one. Raises SaveError if not to the run's."""
    try:
        if is_first():
            check_held(run.workdir)
        run.checkpoints.save(run.state, run.position)
        run.checkpoints.wait()
    except (SaveError, LockError) as failure:
        if jax.process_count() > 1:
            raise
        reasons = dict.fromkeys(str(reason) for reason in (error, failure) if isinstance(reason, InputError))
        raise SaveError("\n".join([*reasons, _elsewhere(run)])) from failure


def _elsewhere(run: Run) -> str:
    """Saves the state in a new folder of the system's place for temporary files, and says so."""
    try:
        checkpoints = Checkpoints(Path(tempfile.mkdtemp(prefix="opendet_jax_")), run.config)
        checkpoints.save(run.state, run.position)
        checkpoints.close()
    except (CheckpointError, OSError) as failure:
        return f"The state after step {run.step} could not be saved elsewhere either: {failure}"
    place = checkpoints.folder / str(run.step)
    return f"The state after step {run.step} is in {place}: move it to {run.checkpoints.folder} to continue from it"
