"""Signals that ask training to stop: finish the step and save at the first, leave at once at the second."""

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from threading import Lock, Thread, current_thread, main_thread
from types import FrameType

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from opendet_jax.errors import InputError

STOPPING = (signal.SIGTERM, signal.SIGINT)
PATIENCE = 3.0  # seconds for Python to answer the first signal, where nothing can be lost
BEFORE = "stopped before the first step; there is nothing to save"
FAILED = 1000  # said in the place of a signal's number: the process cannot go on


class FailedError(InputError):
    """An error of one process, raised in all of them at the same step."""


class Stopped(BaseException):
    """Training was asked to stop. No Exception: like KeyboardInterrupt, it is nothing to recover from on the way."""

    def __init__(self, number: int):
        self.name = signal.Signals(number).name
        super().__init__(self.name)


class StopSignals:
    """Within this context, the first signal is noted; where that is allowed, it interrupts what goes on with Stopped.

    Allowed it is until `defer` is called and in `interrupting`; of several processes never, as the others would wait.

    Python's own handlers wait until the compiler or a step returns. Where nothing can be lost (until `began`, and after
    `saved`) a thread therefore ends the process, with status 0, some seconds after the first signal. The second signal
    ends it at once, and at any time, with status 128 + number. Outside the main thread signals stay the caller's
    business.

    leaving: what that thread does before it ends the process.
    """

    def __init__(self, leaving: Callable[[], None] = lambda: None) -> None:
        self._requested = 0
        self._error: Exception | None = None
        self._interrupts = jax.process_count() == 1
        self._announced: jax.Array | None = None
        self._said: str | None = BEFORE if self._interrupts else None  # on leaving; None: there is something to lose
        self._before_leaving, self._leaving = leaving, Lock()

    def __enter__(self) -> "StopSignals":
        self._installed = current_thread() is main_thread()
        if self._installed:
            self._reader, self._writer = socket.socketpair()
            self._writer.setblocking(False)
            Thread(target=self._count, args=(self._reader,), name="signals", daemon=True).start()
            self._old_descriptor = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
            self._old_handlers = {number: signal.signal(number, self._note) for number in STOPPING}
        return self

    def __exit__(self, *_) -> None:
        if self._installed:
            for number, handler in self._old_handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._old_descriptor)
            self._writer.close()
        self.began()

    def _count(self, reader: socket.socket) -> None:
        seen = 0
        with reader:
            while numbers := reader.recv(16):
                for number in numbers:
                    if number not in STOPPING:
                        continue
                    seen += 1
                    name = signal.Signals(number).name
                    if seen == 1:
                        os.write(2, f"\n{name}: finishing the step, then saving; once more: leaving at once\n".encode())
                        Thread(target=self._leave, args=(name,), daemon=True).start()
                    else:
                        os.write(2, f"\n{name} again: leaving; the newest complete checkpoint stays\n".encode())
                        os._exit(128 + number)

    def _leave(self, name: str) -> None:
        """Unless the signal is answered within the seconds that there are, or something could be lost."""
        time.sleep(PATIENCE)
        with self._leaving:
            if self._said is not None:
                self._before_leaving()
                os.write(1, f"{name}: {self._said}\n".encode())
                os._exit(0)

    def _note(self, number: int, _: FrameType | None) -> None:
        self._requested = self._requested or number
        if self._interrupts:
            raise Stopped(number)

    def defer(self) -> None:
        """From now on a signal interrupts nothing."""
        self._interrupts = False

    def began(self) -> None:
        """A step is on its way: from now on there is something to lose."""
        with self._leaving:
            self._said = None

    def saved(self, said: str) -> None:
        """All steps are saved; what is to be said where the process ends now."""
        with self._leaving:
            self._said = said if jax.process_count() == 1 else None

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Context in which it does again, unless other processes would be left waiting for this one."""
        self._interrupts = jax.process_count() == 1
        try:
            if self._interrupts and self._requested:
                raise Stopped(self._requested)
            yield
        finally:
            self._interrupts = False

    def fail(self, error: Exception) -> None:
        """Raises it; where there are other processes, in `check`, when all have heard of it and can save together."""
        if jax.process_count() == 1:
            raise error
        self._requested, self._error = FAILED, self._error or error

    def check(self) -> None:
        """Call once a step: raises Stopped if a signal came, or FailedError, in every process at the same step.

        Of several processes each says in every step whether it got one, and hears one step later what all have said, so
        that no step waits.
        """
        if jax.process_count() == 1:
            number = self._requested
        else:
            said, self._announced = self._announced, _largest(self._requested)
            number = 0 if said is None else int(said)
        if number == FAILED:
            raise FailedError(str(self._error or "another process could not go on, and says why")) from self._error
        if number:
            raise Stopped(number)

    def check_last(self) -> None:
        """Call after the last step: hears what the others have said in it."""
        if jax.process_count() > 1:
            self.check()
            self.check()


def _largest(number: int) -> jax.Array:
    """The largest of the numbers that the processes give, on its way."""
    split, maximum = _maximum()
    local = np.full(jax.local_device_count(), number, np.int32)
    return maximum(jax.make_array_from_process_local_data(split, local))


@cache
def _maximum() -> tuple[NamedSharding, Callable[[jax.Array], jax.Array]]:
    """How the numbers lie on all devices, and the function of them; compiled once."""
    mesh = Mesh(np.array(jax.devices()), ("all",))
    everywhere = NamedSharding(mesh, PartitionSpec())
    return NamedSharding(mesh, PartitionSpec("all")), jax.jit(jnp.max, out_shardings=everywhere)
