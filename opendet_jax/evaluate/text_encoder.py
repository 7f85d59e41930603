"""The text encoder of an evaluation, with a memory: data sets repeat their names, and models repeat themselves."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float32
from numpy import ndarray

from opendet_jax.weights.embed_names import load_text_encoder
from opendet_jax.weights.rules import WeightsError

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
