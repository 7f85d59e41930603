"""Several processes that train one model: how they find each other, and what they tell each other."""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from opendet_jax.config import MeshConfig
from opendet_jax.errors import InputError


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
