"""The tensors of a model within what trainers save around them: entries beside them, wrappers before their names.

What is taken and what is left is put into words, for the person who converts.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from opendet_jax.errors import WeightsError

# Entries that hold a model, by the trainers that write them; a moving average is taken only where none of these is.
MODEL = ("model", "state_dict", "model_state_dict", "model_state", "module", "net", "network", "params", "weights")
AVERAGE = re.compile(r"(?<![a-zA-Z])ema(?![a-z])|Ema(?![a-z])|EMA|averaged?_model")
COUNTER = "n_averaged"  # PyTorch's AveragedModel keeps it among the tensors
DEPTH = 4  # entries within entries
OF_TRAINING = re.compile(r"optim|sched|scaler|rng|loss|criterion", re.IGNORECASE)
LISTED = 10  # names or entries in a message


class Found(NamedTuple):
    """A dictionary of names and tensors, and a line for each thing that was decided on the way to it."""

    state: Mapping[str, Any]
    notes: tuple[str, ...]


def printable(text: Any) -> str:
    """Text out of a file, without the codes that terminals obey."""
    plain = re.sub(r"\x1b(\[[0-9;?]*[ -/]*[@-~])?", "", str(text))
    return "".join(letter if letter.isprintable() else "?" for letter in plain)


def some(names: Collection[Any]) -> str:
    """The first names of a list and how many more there are."""
    shown = ", ".join(printable(name) for name in list(names)[:LISTED])
    return shown + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")


def model_of(content: Any, file: str) -> Found:
    """The model in what a pickle held: the whole of a plain dictionary of tensors, or an entry of a training file.

    Raises WeightsError, which says what the file holds, where it holds no model or more than one may be meant.
    """
    if not isinstance(content, Mapping):
        raise WeightsError(f"{file}: holds a {type(content).__name__}, not a dictionary of tensors")
    trail = _trail(content, file)
    if trail is None:
        raise WeightsError(
            f"{file}: holds {some(content) or 'nothing'}, but no 'model': a file of the optimizer's state only?"
        )
    notes, state = [], content
    for key in trail:
        beside = [other for other in state if other != key]
        average = f"the moving average {key!r} was taken, as there is no other model" if AVERAGE.search(key) else ""
        taken = average or f"{key!r} was taken"
        notes.append(printable(f"{taken}; beside it: {some(beside)}") if beside else printable(taken))
        state = state[key]
    tensors = {name: value for name, value in state.items() if _is_tensor(value)}
    if len(tensors) < len(state):
        notes.append(f"left out, as they are no tensors: {some([name for name in state if name not in tensors])}")
    strange = [name for name in tensors if not isinstance(name, str)]
    if strange:
        raise WeightsError(f"{file}: holds tensors that have numbers for names: {some(strange)}")
    return Found(tensors, tuple(notes))


def _is_tensor(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def _is_state(value: Any) -> bool:
    """Whether it is a dictionary of nothing but tensors, by name."""
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(name, str) and _is_tensor(tensor) for name, tensor in value.items())
    )


def _trail(content: Mapping[Any, Any], file: str, depth: int = DEPTH) -> tuple[str, ...] | None:
    """The keys that lead to the model's dictionary; None where there is none."""
    if _is_state(content):
        return ()
    texts = [key for key in content if isinstance(key, str)]
    known = [key for key in MODEL if key in texts]
    for key in (*known, *(key for key in texts if AVERAGE.search(key) and key not in known)):
        if isinstance(content[key], Mapping) and depth:
            inner = _trail(content[key], file, depth - 1)
            if inner is not None:
                return (key, *inner)
    states = [key for key in texts if _is_state(content[key]) and not OF_TRAINING.search(key)]
    if len(states) > 1:
        raise WeightsError(
            f"{file}: holds {len(states)} dictionaries of tensors, and none is called 'model': {some(states)}; "
            "save the one that is meant alone"
        )
    if states:
        return (states[0],)
    # Other things among the tensors: a step's number, say.
    return () if any(_is_tensor(value) for key, value in content.items() if not OF_TRAINING.search(str(key))) else None


def without_wrapper(state: Mapping[str, Any], anchors: Sequence[str], file: str) -> Found:
    """The names of a model whose wrappers put something before each ("module.", "model.backbone.").

    `anchors` are names of which the model has one; the first that any name ends in shows the wrapper. Names that do not
    begin with it are of other parts and are left out. Where a model and its moving average stand side by side, the
    model is taken. A state without an anchor is given back as it is.
    Raises WeightsError where several models stand side by side.
    """
    for anchor in anchors:
        wrappers = [name.removesuffix(anchor) for name in state if f".{name}".endswith(f".{anchor}")]
        if wrappers:
            break
    else:
        return Found(state, ())
    plain = [wrapper for wrapper in wrappers if not AVERAGE.search(wrapper)] or wrappers
    if "" in plain:
        return Found(state, ())
    if len(plain) > 1:
        raise WeightsError(f"{file}: holds {len(plain)} models, before whose names stands {some(plain)}")
    [wrapper] = plain
    inner = {name.removeprefix(wrapper): value for name, value in state.items() if name.startswith(wrapper)}
    notes = [f"{len(inner)} names are read without the {printable(wrapper)!r} before them"]
    others = [name for name in state if not name.startswith(wrapper)]
    if others:
        notes.append(f"left out, as {printable(wrapper)!r} is not before them: {len(others)} ({some(others)})")
    return Found(inner, tuple(notes))
