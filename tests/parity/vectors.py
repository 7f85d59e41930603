"""Reads the authors' numbers: `vectors[key]`, subsets of large arrays, and the weights behind them."""

import importlib.util
from pathlib import Path

import numpy as np


class Vectors:
    """One npz file of the vectors' folder."""

    def __init__(self, path: Path):
        self.path = path
        self.arrays = dict(np.load(path))

    def __getitem__(self, key: str) -> np.ndarray:
        return self.arrays[key]

    def __contains__(self, key: str) -> bool:
        return key in self.arrays or f"{key}/values" in self.arrays

    def assert_close(self, key: str, got, atol: float) -> None:
        """Compares `got` (in the file's layout) with a stored array, whole or strided; prints the error found."""
        got = np.asarray(got)
        if key in self.arrays:
            want = self.arrays[key]
            assert want.shape == got.shape, f"{key}: shape {got.shape}, stored {want.shape}"
        else:
            assert tuple(self.arrays[f"{key}/shape"]) == got.shape, f"{key}: shape {got.shape}"
            want = self.arrays[f"{key}/values"]
            got = got.reshape(-1)[:: int(self.arrays[f"{key}/stride"])]
        error = np.abs(want - got).max()
        print(f"{self.path.stem} {key}: max abs error {error:.2e} (tolerance {atol:.0e})")
        assert error <= atol, f"{self.path.stem} {key}: max abs error {error:.3e} > {atol:.0e}"


def parity_weights(folder: Path):
    """The vectors' own module `parity_weights`, which rebuilds any weight from its name and shape."""
    spec = importlib.util.spec_from_file_location("parity_weights", folder / "parity_weights.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def state_dict(folder: Path, vectors: Vectors) -> dict[str, np.ndarray]:
    """The state dict (canonical names; only tensors that are used) of the model that computed the vectors."""
    make = parity_weights(folder).make
    state = {}
    for line in (folder / "state_dict.txt").read_text().splitlines():
        if line.startswith("# Aliases"):
            break
        if line.startswith("#") or not line.strip():
            continue
        name, shape, _, use = line.split("\t")
        if use == "used":
            shape = tuple(int(n) for n in shape.strip("()").split(",") if n.strip())
            state[name] = make(name, shape, str(vectors["meta/salt"]), float(vectors["meta/score_bias"]))
    return state
