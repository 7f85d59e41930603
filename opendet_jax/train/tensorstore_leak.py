"""What TensorStore never gives back, of which a checkpoint of 983 arrays would cost a run 0.8 MiB for good.

`KvStore.Spec.to_json` keeps the strings that it makes (seen in 0.1.78 to 0.1.86): 0.25 KiB a call, and the pages around
them. Orbax calls it for the folder of every array that it saves or restores. These folders are few, so here every
different question is asked once. Nothing of this is needed when TensorStore frees them.
"""

from copy import deepcopy
from typing import Any

import tensorstore as ts

LIMIT = 64  # answers: a save asks about a folder for each of its items

_to_json = ts.KvStore.Spec.to_json
_answers: dict[tuple[str, bool], Any] = {}


def ask_once() -> None:
    """From now on in this process; the answers are the same."""
    ts.KvStore.Spec.to_json = _remembered


def _remembered(self: ts.KvStore.Spec, include_defaults: bool = False) -> Any:
    question = (repr(self), include_defaults)  # the text has all that a spec consists of
    answer = _answers.get(question)
    if answer is None:
        answer = _to_json(self, include_defaults=include_defaults)
        if len(_answers) >= LIMIT:
            _answers.clear()
        _answers[question] = answer
    return deepcopy(answer)
