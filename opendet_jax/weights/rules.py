"""One engine for weight conversion: a table of rules, and an error that lists everything it does not cover.

A rule says: a source name that matches `pattern` becomes `path` in our tree (slashes separate modules; `\\1` refers to
the pattern's groups), its array passed through `transform`. A rule with path None names tensors known to be dead.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np
from flax.traverse_util import unflatten_dict


def same(x: np.ndarray) -> np.ndarray:
    return x


def linear(x: np.ndarray) -> np.ndarray:
    """(out, in) → (in, out)."""
    return x.T


def conv(x: np.ndarray) -> np.ndarray:
    """(out, in, h, w) → (h, w, in, out)."""
    return x.transpose(2, 3, 1, 0)


class Rule(NamedTuple):
    pattern: str
    path: str | None
    transform: Callable[[np.ndarray], np.ndarray] = same


def target(name: str, rules: Iterable[Rule]) -> tuple[str | None, Callable[[np.ndarray], np.ndarray]]:
    """The path and transform of the first rule whose pattern matches the whole name; KeyError if there is none."""
    for rule in rules:
        match = re.fullmatch(rule.pattern, name)
        if match:
            return (match.expand(rule.path) if rule.path is not None else None), rule.transform
    raise KeyError(name)


def convert(source: Mapping[str, np.ndarray], rules: Iterable[Rule]) -> dict:
    """The nested parameter tree of a flat PyTorch state. Raises KeyError listing every name no rule covers."""
    rules = tuple(rules)
    flat, unknown = {}, []
    for name, value in source.items():
        try:
            path, transform = target(name, rules)
        except KeyError:
            unknown.append(f"{name} {tuple(value.shape)}")
            continue
        if path is not None:
            flat[tuple(path.split("/"))] = transform(np.asarray(value))
    if unknown:
        raise KeyError(f"{len(unknown)} tensors have no rule:\n  " + "\n  ".join(unknown))
    return unflatten_dict(flat)
