"""Text embeddings T_e of object names: unit vectors of "a " + name, from a table made by CLIP or a stand-in.

Method: docs/method.md#5-aligner.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Float32, Int, Int64
from numpy import ndarray
from scipy.sparse import csr_matrix
from sklearn.feature_extraction.text import HashingVectorizer

from opendet_jax.config import DataConfig
from opendet_jax.errors import InputError


class EmbeddingError(InputError):
    """A table that cannot be used, or that lacks names of the data set: the message names it and them."""


@runtime_checkable
class Rows(Protocol):
    """Unit rows of a list of names, to index by an array of their places."""

    def __getitem__(self, places: Int[ndarray, " k"], /) -> Float32[ndarray, "k E"]: ...


@runtime_checkable
class TextEmbedder(Protocol):
    width: int  # E

    def embed(self, names: Sequence[str]) -> Float32[ndarray, "n E"]:
        """Unit rows, one a name."""
        ...

    def rows(self, names: Sequence[str]) -> Rows:
        """The same rows, of which only those asked for need be in memory. Names without one are an error here."""
        ...


def _unit_rows(rows: Float[ndarray, "n E"]) -> Float32[ndarray, "n E"]:
    rows = rows.astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def _key(name: str) -> str:
    return name.strip().lower()


@dataclass(frozen=True, eq=False)
class TableRows:
    """Rows that stay in their file, which is mapped into memory: each access reads those asked for."""

    table: Float[ndarray, "rows E"]
    row_of_place: Int64[ndarray, " n"]

    def __getitem__(self, places: Int[ndarray, " k"], /) -> Float32[ndarray, "k E"]:
        return _unit_rows(np.asarray(self.table[self.row_of_place[places]]))


class TableEmbedder:
    """Looks names up, lower-cased and stripped, in a .npy of rows whose names are the list in the .json beside it.

    Raises EmbeddingError for a table that is not of that form, and one that lists every name the table does not have.
    """

    def __init__(self, table: str | Path):
        self.path = Path(table)
        names_path = self.path.with_suffix(".json")
        for path in (self.path, names_path):
            if not path.is_file():
                raise EmbeddingError(
                    f"{path}: no such file (a table of text embeddings is a .npy and a .json beside it)"
                )
        try:
            self._rows = np.load(self.path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise EmbeddingError(f"{self.path}: is not a table of numbers: {error}") from error
        names = json.loads(names_path.read_text(encoding="utf-8"))
        if self._rows.ndim != 2 or len(names) != len(self._rows):
            raise EmbeddingError(
                f"{self.path}: shape {self._rows.shape} does not match the {len(names)} names of {names_path}"
            )
        self.width = self._rows.shape[1]
        self._row_of: dict[str, int] = {}
        for row, name in enumerate(names):
            self._row_of.setdefault(_key(name), row)

    def embed(self, names: Sequence[str]) -> Float32[ndarray, "n E"]:
        return self.rows(names)[np.arange(len(names))]

    def rows(self, names: Sequence[str]) -> TableRows:
        missing = sorted({name for name in names if _key(name) not in self._row_of})
        if missing:
            raise EmbeddingError(
                f"{self.path}: has no embedding of {len(missing)} names: {', '.join(map(repr, missing))}"
            )
        return TableRows(self._rows, np.array([self._row_of[_key(name)] for name in names], np.int64))


class HashedEmbedder:
    """The offline stand-in for CLIP's text tower: hashed letter n-grams of "a " + name under a fixed random projection.

    It has no knowledge of meaning. Names are near where they share letters: "red ring" is near "red star" and far from
    "scarlet hoop". Enough to learn which name is which, not to generalise to unrelated words.
    """

    FEATURES = 4096
    SEED = 0

    def __init__(self, width: int):
        self.width = width
        self._hashing = HashingVectorizer(analyzer="char_wb", ngram_range=(2, 5), n_features=self.FEATURES)
        self._projection = np.random.default_rng(self.SEED).standard_normal((self.FEATURES, width), np.float32)

    def embed(self, names: Sequence[str]) -> Float32[ndarray, "n E"]:
        if not names:
            return np.zeros((0, self.width), np.float32)
        counts = csr_matrix(self._hashing.transform([f"a {_key(name)}" for name in names]))
        return _unit_rows(counts.dot(self._projection))

    def rows(self, names: Sequence[str]) -> Float32[ndarray, "n E"]:
        return self.embed(names)


def make_embedder(config: DataConfig, width: int) -> TextEmbedder:
    """The embedder that the config asks for; EmbeddingError where its width is not the model's E."""
    if config.text_embeddings == "hashed":
        return HashedEmbedder(width)
    embedder = TableEmbedder(config.text_table)
    if embedder.width != width:
        raise EmbeddingError(f"{embedder.path}: embeddings are {embedder.width} wide, model.text_width is {width}")
    return embedder
