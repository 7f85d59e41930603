"""Gradients that are not finite: their updates are refused inside the step, seen by the host one step later.

The step itself keeps the old state when a loss term or the gradient is not finite, so that nothing bad ever
reaches a parameter although the host has already sent the next step when it learns of it. The host reads the flag of
the step before the one it just sent: the device never waits for it.
"""

from collections import deque
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Array, Bool, Float

from opendet_jax.data.pipeline import TrainingBatch
from opendet_jax.errors import InputError
from opendet_jax.train.optimizer import TrainState

Policy = Literal["stop", "skip"]
REFUSED = "refused"  # the term that counts refused updates

Terms = dict[str, Float[Array, ""]]


def is_taken(state: TrainState, terms: Terms, policy: Policy) -> Bool[Array, ""]:
    """Whether losses and gradient are finite and, where the policy is "stop", no update was refused before.

    The total is not finite if any loss is not. Of finite, clipped gradients AdamW's update is finite, as rates are at
    most 1.
    """
    finite = jnp.isfinite(terms["total"]) & jnp.isfinite(terms["gradient_norm"])
    return finite if policy == "skip" else finite & (state.refused == 0)


def count_refused(
    old: TrainState, new: TrainState, taken: Bool[Array, ""], terms: Terms, policy: Policy
) -> tuple[TrainState, Terms]:
    """`new` and the terms, with the number of refused updates so far.

    A refused step counts as a step where the policy is "skip". Where it is "stop", it does not, and every later step is
    refused too: the state stays what it was before the bad batch until the host stops.
    """
    refused = old.refused + jnp.where(taken, 0, 1)
    step = new.step if policy == "skip" else jnp.where(taken, new.step, old.step)
    return replace(new, step=step, refused=refused), terms | {REFUSED: refused}


class NonFiniteError(InputError):
    """A step whose loss or gradient is not a finite number."""

    def __init__(self, message: str, sent: "Sent"):
        super().__init__(message)
        self.sent = sent


@dataclass(frozen=True, eq=False)
class Sent:
    """A step on its way: what is needed to do it again."""

    step: int  # steps taken before it
    batch: TrainingBatch  # this process's share
    iterator_state: dict[str, Any]  # from which the batch was drawn
    terms: Terms

    def bad_terms(self) -> list[str]:
        values = jax.device_get(self.terms)
        return [name for name, value in values.items() if not np.isfinite(value)]


class Watch:
    """Follows the steps that were sent, and keeps their batches until they are known to be good."""

    def __init__(self, policy: Policy, refused: int = 0):
        self._policy = policy
        self._refused = refused
        self._sent: deque[Sent] = deque()

    def add(self, sent: Sent) -> None:
        """Notes a step and looks at the one before it.

        Raises NonFiniteError where that was refused and the policy is "stop".
        """
        self._sent.append(sent)
        while len(self._sent) > 1:
            self._look(self._sent.popleft())

    def look_at_all(self) -> None:
        """Waits for every step sent so far. Raises NonFiniteError."""
        while self._sent:
            self._look(self._sent.popleft())

    def _look(self, sent: Sent) -> None:
        refused = int(sent.terms[REFUSED])
        if refused == self._refused:
            return
        self._refused = refused
        message = (
            f"step {sent.step + 1}: {', '.join(sent.bad_terms())} not finite; images {sent.batch.image_ids.tolist()}"
        )
        if self._policy == "stop":
            raise NonFiniteError(message, sent)
        logging.warning("skipped (%d so far): %s", refused, message)
