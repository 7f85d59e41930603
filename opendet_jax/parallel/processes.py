"""Several processes: those that train one model find each other and tell each other things; those that train another
keep out of each other's workdir.

Two trainings in one workdir would replace each other's checkpoints, and Orbax reports success to both. A file there
names the process that trains, on any file system that machines share. It shows signs of life: whoever is killed leaves
a file that shows none any more, and the next training takes its place.
"""

import json
import os
import pickle
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from opendet_jax.config import MeshConfig
from opendet_jax.errors import InputError

LOCK = "training.lock"
BEAT = 10.0  # seconds between two signs of life
DEAD = 120.0  # seconds without one
SETTLED = 1.0  # seconds in which of several that take over the last one has won


def _numbering() -> str:
    """Where the numbers of processes mean the same: until the machine starts anew, and in one container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return ""


_ME = {
    "host": socket.gethostname(),
    "numbering": _numbering(),
    "process": os.getpid(),
    "token": secrets.token_hex(8),
}


class LockError(InputError):
    """Another training is at work in the workdir."""


class ProcessError(InputError):
    """Processes that do not find each other."""


def join_processes(config: MeshConfig) -> None:
    """Connects this process to the others; before anything else is asked of JAX. One process has nothing to do.

    Raises:
        ProcessError: the others cannot be reached, or there is no cluster to ask.
    """
    if config.processes == 1:
        return
    given: dict[str, Any] = {}
    if config.processes > 1:
        given = {
            "coordinator_address": config.coordinator,
            "num_processes": config.processes,
            "process_id": config.process,
        }
    try:
        jax.distributed.initialize(**given)
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        if not given:
            reason = f"no cluster that JAX knows ({reason}); give mesh.processes, mesh.process and mesh.coordinator"
        raise ProcessError(f"config.mesh.processes = {config.processes}: {reason}") from error


def is_first() -> bool:
    """Whether this is the process that writes files and prints."""
    return jax.process_index() == 0


@contextmanager
def first_process_first(what: str) -> Iterator[None]:
    """The block is run by the first process, and when that is done by the others; `what` names it for JAX."""
    if not is_first():
        multihost_utils.sync_global_devices(what)
    try:
        yield
    finally:
        if is_first():
            multihost_utils.sync_global_devices(what)


def exchange(value: Any) -> list[Any]:
    """The value of each process, in all of them; every process calls this. For small things: results, not arrays."""
    if jax.process_count() == 1:
        return [value]
    own = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.array([own.size]))).reshape(-1)
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: own.size] = own
    gathered = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(sizes), -1)
    return [pickle.loads(row[:size].tobytes()) for row, size in zip(gathered, sizes, strict=True)]


@contextmanager
def only_training(workdir: Path) -> Iterator[None]:
    """Holds the workdir (made if missing). Of several processes the first holds it for all; every one calls this.

    Raises:
        LockError: another training holds it, or the file cannot be written.
    """
    problem = ""
    if is_first():
        try:
            _take(workdir / LOCK)
        except LockError as error:
            problem = str(error)
    said = exchange(problem)[0]
    if said:
        raise LockError(said)
    ended = threading.Event()
    if is_first():
        threading.Thread(target=_beat, args=(workdir / LOCK, ended), name="lock", daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        release(workdir)


def release(workdir: Path) -> None:
    """Lets other trainings have the workdir, if this process holds it."""
    path = workdir / LOCK
    held = _read(path)
    if held and _mine(held):
        path.unlink(missing_ok=True)


def check_held(workdir: Path) -> None:
    """Raises LockError where another training has taken the workdir, as if this one were dead."""
    held = _read(workdir / LOCK)
    if held and not _mine(held):
        raise LockError(f"{workdir}: {_who(held)} has taken it over, as this training showed no sign of life")


def _take(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LockError(f"{path.parent}: cannot be made: {error.strerror}") from error
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(_content())
        return
    except FileExistsError:
        pass
    except OSError as error:
        with suppress(OSError):
            path.unlink(missing_ok=True)  # made, and empty, where the disk is full
        raise LockError(f"{path}: cannot be written: {error.strerror}") from error
    held = _read(path)
    silent = _silent_for(path)
    if not (held and _gone(held)) and silent <= DEAD:
        raise LockError(
            f"{path.parent}: {_who(held)} trains here, and showed a sign of life {max(0.0, silent):.0f} s ago; "
            f"name another --workdir, or, where it is surely gone, remove {path} or wait {DEAD:.0f} s"
        )
    logging.warning("%s: left by %s, which is gone; taken over", path, _who(held))
    _replace(path)
    time.sleep(SETTLED)
    held = _read(path)
    if held is not None and not _mine(held):
        raise LockError(f"{path.parent}: {_who(held)} trains here; name another --workdir")


def _content() -> str:
    return json.dumps({**_ME, "since": time.strftime("%Y-%m-%d %H:%M:%S")}) + "\n"


def _replace(path: Path) -> None:
    part = path.with_name(f".{path.name}.{_ME['token']}")
    try:
        part.write_text(_content(), encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        raise LockError(f"{path}: cannot be written: {error.strerror}") from error


def _beat(path: Path, ended: threading.Event) -> None:
    while not ended.wait(BEAT):
        held = _read(path)
        if held and _mine(held):
            try:
                os.utime(path)
            except OSError:  # the disk, or the whole folder, is gone; whatever is saved next says so
                continue


def _read(path: Path) -> dict | None:
    """What the file says; nothing where it is missing, or still empty because it is just being written."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return held if isinstance(held, dict) else None


def _mine(held: dict) -> bool:
    return held.get("token") == _ME["token"]


def _gone(held: dict) -> bool:
    """Whether the process of a file is surely none any more: only of this machine that can be asked."""
    if any(held.get(name) != _ME[name] for name in ("host", "numbering")) or _mine(held):
        return False
    number = held.get("process")
    if not isinstance(number, int) or number <= 0 or number == os.getpid():  # this one has not taken it
        return True
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return True
    except OSError:  # another user's
        return False
    return False


def _silent_for(path: Path) -> float:
    """Seconds since the last sign of life, by the clock of the file system itself."""
    probe = path.with_name(f".{path.name}.{_ME['token']}")
    try:
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink()
        return now - path.stat().st_mtime
    except FileNotFoundError:  # it has just been released
        return float("inf")
    except OSError as error:
        raise LockError(f"{path.parent}: cannot be written: {error.strerror}") from error


def _who(held: dict | None) -> str:
    if not held:
        return "another process"
    return f"process {held.get('process')} on {held.get('host')} (begun {held.get('since')})"
