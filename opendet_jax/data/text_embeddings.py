"""Text embeddings T_e of object names: unit vectors of "a " + name, from a table made by CLIP or a stand-in.

Method: docs/method.md#5-aligner.
"""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Float32, Int, Int64
from numpy import ndarray

from opendet_jax.config import DataConfig, split_of
from opendet_jax.data.formats.label_folders import label_form
from opendet_jax.errors import InputError

PIECE = 4096  # rows


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


def table_key(name: str) -> str:
    """Names with equal keys have one row."""
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

    A name that the table lacks is looked for with spaces in the place of its underscores. `command` makes a table that
    has all names, for messages.
    Raises EmbeddingError for a table that is not of that form, and one that lists every name the table does not have.
    """

    def __init__(self, table: str | Path, command: str = ""):
        self.path, self._help = Path(table), f"; make one that has them: {command}" if command else ""
        names_path = self.path.with_suffix(".json")
        for path in (self.path, names_path):
            if not path.is_file():
                raise EmbeddingError(
                    f"{path}: no such file (a table of text embeddings is a .npy and a .json beside it)"
                    + (f"; make it: {command}" if command else "")
                )
        try:
            self._rows = np.load(self.path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise EmbeddingError(f"{self.path}: is not a table of numbers: {error}") from error
        if not np.issubdtype(self._rows.dtype, np.floating):
            raise EmbeddingError(f"{self.path}: is a table of {self._rows.dtype}, not of floating-point numbers")
        names = _names_of_rows(names_path)
        if self._rows.ndim != 2 or len(names) != len(self._rows):
            raise EmbeddingError(
                f"{self.path}: shape {self._rows.shape} does not match the {len(names)} names of {names_path}"
            )
        self.width = self._rows.shape[1]
        self._row_of: dict[str, int] = {}
        for row, name in enumerate(names):
            self._row_of.setdefault(table_key(name), row)

    def _row(self, name: str) -> int | None:
        key = table_key(name)
        return self._row_of.get(key, self._row_of.get(table_key(key.replace("_", " "))))

    def embed(self, names: Sequence[str]) -> Float32[ndarray, "n E"]:
        return self.rows(names)[np.arange(len(names))]

    def rows(self, names: Sequence[str]) -> TableRows:
        places = [self._row(name) for name in names]
        missing = sorted({name for name, place in zip(names, places, strict=True) if place is None})
        if missing:
            raise EmbeddingError(
                f"{self.path}: has no embedding of {len(missing)} names: {', '.join(map(repr, missing))}{self._help}"
            )
        found = np.array(places, np.int64)
        if bad := [names[place] for place in self._without_direction(found)]:
            raise EmbeddingError(
                f"{self.path}: embeddings that are zero or not finite, of {len(bad)} names: "
                + ", ".join([*map(repr, bad[:20]), *(["…"] if len(bad) > 20 else [])])
            )
        return TableRows(self._rows, found)

    def _without_direction(self, places: Int64[ndarray, " n"]) -> list[int]:
        """Which of the rows no unit row can be made of; the table is read in pieces."""
        bad: list[int] = []
        for start in range(0, len(places), PIECE):
            lengths = np.linalg.norm(np.asarray(self._rows[places[start : start + PIECE]], np.float32), axis=1)
            bad += (start + np.flatnonzero(~np.isfinite(lengths) | (lengths == 0))).tolist()
        return bad


def _names_of_rows(path: Path) -> list[str]:
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise EmbeddingError(f"{path}: cannot be read as a list of names: {error}") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise EmbeddingError(f"{path}: is not a list of names")
    return names


class HashedEmbedder:
    """The offline stand-in for CLIP's text tower: hashed letter n-grams of "a " + name under a fixed random projection.

    It has no knowledge of meaning. Names are near where they share letters: "red ring" is near "red star" and far from
    "scarlet hoop". Enough to learn which name is which, not to generalise to unrelated words.
    """

    FEATURES = 4096
    SEED = 0

    def __init__(self, width: int):
        from sklearn.feature_extraction.text import HashingVectorizer  # a third of what training imports

        self.width = width
        self._hashing = HashingVectorizer(analyzer="char_wb", ngram_range=(2, 5), n_features=self.FEATURES)
        self._projection = np.random.default_rng(self.SEED).standard_normal((self.FEATURES, width), np.float32)

    def embed(self, names: Sequence[str]) -> Float32[ndarray, "n E"]:
        if not names:
            return np.zeros((0, self.width), np.float32)
        from scipy.sparse import csr_matrix

        counts = csr_matrix(self._hashing.transform([f"a {table_key(name)}" for name in names]))
        return _unit_rows(counts.dot(self._projection))

    def rows(self, names: Sequence[str]) -> Float32[ndarray, "n E"]:
        return self.embed(names)


def make_embedder(config: DataConfig, width: int, encoder: str = "") -> TextEmbedder:
    """The embedder that the config asks for; EmbeddingError where its width is not the model's E.

    `encoder`: the folder of CLIP's text tower, for messages, where the config names one.
    """
    if config.text_embeddings == "hashed":
        return HashedEmbedder(width)
    embedder = TableEmbedder(config.text_table, table_command(config, encoder))
    if embedder.width != width:
        raise EmbeddingError(f"{embedder.path}: embeddings are {embedder.width} wide, model.text_width is {width}")
    return embedder


def table_command(config: DataConfig, encoder: str = "") -> str:
    """The command that makes a table of the config's names, in a file that is not there yet."""
    evaluated = replace(config.eval, annotations=_with_split(config.eval.annotations, "val"))
    sets = [paths for paths in (config.train, *config.mixture, evaluated) if paths.annotations]
    sources = dict.fromkeys((paths.annotations, paths.name_field) for paths in sets)  # each once
    if config.source == "json" and sources:
        fields = [field for _, field in sources]
        named = ["--annotations", *(annotations for annotations, _ in sources)]
        if any(fields):
            named += ["--name_field", *(fields[:1] if len(set(fields)) == 1 else fields)]
    else:
        named = ["--names", "names.txt"]
    table, number = Path(config.text_table or "names.npy"), 2
    out = table
    while out.exists() or out.with_suffix(".json").exists():
        out, number = table.with_stem(f"{table.stem}_{number}"), number + 1
    words = ["python", "-m", "opendet_jax.weights", "embed-names", *named]
    return shlex.join([*words, "--encoder", encoder or "weights/clip", "--out", str(out)])


def _with_split(annotations: str, split: str) -> str:
    """With the split that is read of a YOLO or VOC folder, where none is named: embed-names would take another."""
    path, named = split_of(annotations)
    has_splits = label_form(path) == "YOLO" or (label_form(path) and (path / "ImageSets").is_dir())
    return f"{annotations}:{split}" if annotations and has_splits and not named else annotations
