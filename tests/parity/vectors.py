"""Reads the authors' numbers: `vectors[key]`, subsets of large arrays, and the weights behind them."""

import importlib.util
from copy import copy
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from opendet_jax.weights.open_det import OPENDET_RULES
from opendet_jax.weights.rules import nested
from tests.parity import report

STAGE, MODEL, BOXES = 1e-5, 5e-5, 5e-6  # on stored inputs; of the whole model; of boxes in either


class Vectors:
    """One npz file of the vectors' folder."""

    def __init__(self, path: Path):
        self.path = path
        self.arrays = dict(np.load(path))

    @property
    def name(self) -> str:
        return self.path.stem

    def __getitem__(self, key: str) -> np.ndarray:
        return self.arrays[key]

    def __contains__(self, key: str) -> bool:
        return key in self.arrays or f"{key}/values" in self.arrays

    def cases(self, prefix: str, depth: int = 1) -> list[str]:
        """The names that follow a prefix, in the file's order."""
        found = (key.removeprefix(prefix).split("/") for key in self.arrays if key.startswith(prefix))
        return list(dict.fromkeys("/".join(parts[:depth]) for parts in found))

    def within(self, prefix: str) -> "Vectors":
        """The part whose keys start with a prefix, without it."""
        part = copy(self)
        part.arrays = {key.removeprefix(prefix): x for key, x in self.arrays.items() if key.startswith(prefix)}
        return part

    def pair(self, key: str, got: Any) -> tuple[np.ndarray, np.ndarray]:
        """Stored and computed numbers of a key, whole or strided alike."""
        got = np.asarray(got)
        if key in self.arrays:
            want = self.arrays[key]
            assert want.shape == got.shape, f"{key}: shape {got.shape}, stored {want.shape}"
            return want, got
        assert tuple(self.arrays[f"{key}/shape"]) == got.shape, f"{key}: shape {got.shape}"
        return self.arrays[f"{key}/values"], got.reshape(-1)[:: int(self.arrays[f"{key}/stride"])]

    def assert_close(self, stage: str, key: str, got: Any, atol: float) -> None:
        """Compares `got` (in the file's layout) with a stored array and enters the error into the report.

        A key that the file lacks is left out.
        """
        if key not in self:
            return
        want, got = self.pair(key, got)
        report.enter(stage, self.name, want, got, atol)
        error = np.abs(want - got).max(initial=0.0)
        assert error <= atol, f"{self.name} {key}: max abs error {error:.3e} > {atol:.0e}"

    def assert_equal(self, stage: str, key: str, got: Any) -> None:
        """The same for discrete numbers: indices, tokens, decisions."""
        if key not in self:
            return
        want, got = self.pair(key, got)
        report.enter(stage, self.name, want, got, 0.0)
        np.testing.assert_array_equal(got, want, err_msg=f"{self.name} {key}")


@cache
def weight_rule(folder: Path) -> ModuleType:
    """The vectors' own module `parity_weights`, which rebuilds any weight from its name and shape."""
    spec = importlib.util.spec_from_file_location("parity_weights", folder / "parity_weights.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def _all_params(folder: Path, salt: str, score_bias: float) -> dict[str, np.ndarray]:
    make, filled = weight_rule(folder).make, {}
    for line in (folder / "state_dict.txt").read_text().splitlines():
        if line.startswith("# Aliases"):
            break
        if line.startswith("#") or not line.strip():
            continue
        name, shape, _, use = line.split("\t")
        if use == "used":
            sides = tuple(int(n) for n in shape.strip("()").split(",") if n.strip())
            path, layout, _ = OPENDET_RULES.place(name)
            filled[path] = np.ascontiguousarray(layout.ours(make(name, sides, salt, score_bias)))
    return filled


def params_of(vectors: Vectors, *parts: str) -> dict[str, Any]:
    """The weights of the model that computed a file, in our tree; only the parts (first names) that are asked for."""
    salt, bias = str(vectors["meta/salt"]), float(vectors["meta/score_bias"])
    filled = _all_params(vectors.path.parent, salt, bias)
    return nested({path: x for path, x in filled.items() if not parts or path.split("/")[0] in parts})
