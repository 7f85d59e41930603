"""Names as vectors, for the mapping and for the analysis of alignment: by the text encoder, as the paper has it, or by
a stand-in. The encoder has a memory: data sets repeat their names, and models repeat themselves.

Method: docs/method.md#13-evaluation.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32
from numpy import ndarray

from opendet_jax.config import Config
from opendet_jax.data.formats.records import Dataset
from opendet_jax.data.text_embeddings import EmbeddingError, TextEmbedder, make_embedder
from opendet_jax.errors import WeightsError
from opendet_jax.evaluate.name_mapping import class_text, generated_text
from opendet_jax.weights.embed_names import load_text_encoder

REMEMBERED = 65_536  # texts; of 768 numbers each, 200 MB


class RememberingEncoder:
    """Texts to unit rows by `encode`, which sees a text again only after `capacity` others have been asked for."""

    def __init__(self, encode: Callable[[Sequence[str]], Float32[ndarray, "n E"]], width: int, capacity: int):
        self.width = width  # E
        self._encode, self._capacity = encode, capacity
        self._rows: dict[str, Float32[ndarray, " E"]] = {}  # the longest unused first

    def __call__(self, texts: Sequence[str]) -> Float32[ndarray, "n E"]:
        wanted = dict.fromkeys(texts)
        new = [text for text in wanted if text not in self._rows]
        known = {text: self._rows.pop(text) for text in wanted if text in self._rows}
        # Copies, as a row that is a view would keep its whole batch in memory.
        rows = known | {text: row.copy() for text, row in zip(new, self._encode(new) if new else (), strict=True)}
        self._rows |= rows
        excess = len(self._rows) - self._capacity
        if excess > 0:
            for text in list(self._rows)[:excess]:
                del self._rows[text]
        return np.array([rows[text] for text in texts], np.float32).reshape(-1, self.width)


def load_encoder(folder: str) -> RememberingEncoder:
    """CLIP's text tower in the folder `eval.text_encoder`.

    Raises WeightsError where there is no tower, or no tokenizer beside it.
    """
    try:
        encoder = load_text_encoder(Path(folder))
    except WeightsError as error:
        raise WeightsError(f"eval.text_encoder: {error}") from error
    return RememberingEncoder(encoder, encoder.width, REMEMBERED)


@runtime_checkable
class NameTexts(Protocol):
    title: str
    width: int  # E

    def true(self, names: Sequence[str]) -> Float32[ndarray, "n E"]:
        """Unit rows T_e of objects' names."""
        ...

    def generated(self, names: Sequence[Sequence[str]]) -> Float32[ndarray, "n E"]:
        """Unit rows of generated names, each given from best to worst beam; NaN where there is none."""
        ...


class EncodedNames:
    """By a text encoder: of a generated name what the mapping "text_encoder" sees of it, all beams in one."""

    title = "text_encoder"

    def __init__(self, encoder: RememberingEncoder):
        self.width = encoder.width
        self._encoder = encoder

    def true(self, names: Sequence[str]) -> Float32[ndarray, "n E"]:
        return self._encoder([class_text(name) for name in names])

    def generated(self, names: Sequence[Sequence[str]]) -> Float32[ndarray, "n E"]:
        return self._encoder([generated_text(beams) for beams in names])


class EmbeddedNames:
    """By the embedder of the training data: of a generated name the best beam, which a table may not know."""

    def __init__(self, embedder: TextEmbedder, title: str):
        self.title, self.width = title, embedder.width
        self._embedder = embedder

    def true(self, names: Sequence[str]) -> Float32[ndarray, "n E"]:
        return self._embedder.embed(names)

    def generated(self, names: Sequence[Sequence[str]]) -> Float32[ndarray, "n E"]:
        best = [beams[0] for beams in names]
        row_of = {name: self._row(name) for name in set(best)}
        return np.array([row_of[name] for name in best], np.float32).reshape(-1, self.width)

    def _row(self, name: str) -> Float32[ndarray, " E"]:
        try:
            return self._embedder.embed([name])[0]
        except EmbeddingError:
            return np.full(self.width, np.nan, np.float32)


def name_texts(dataset: Dataset, config: Config, encoder: RememberingEncoder | None) -> NameTexts:
    """By `encoder`, or, where it is None, as `data.text_embeddings` says.

    Raises EmbeddingError where vectors are not as wide as the model's, or a true name has none.
    """
    width = config.model.text_width
    if encoder is None:
        embedder = make_embedder(config.data, width, config.eval.text_encoder)
        embedder.rows(sorted({names[0] for record in dataset.records for names in record.names}))
        return EmbeddedNames(embedder, config.data.text_embeddings)
    if encoder.width != width:
        raise EmbeddingError(
            f"eval.text_encoder: {config.eval.text_encoder!r} gives {encoder.width} numbers a text, "
            f"model.text_width is {width}: eval.alignment_analysis needs the encoder that the model was trained with"
        )
    return EncodedNames(encoder)
