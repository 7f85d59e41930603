"""Names ↔ tokens of the language model. In every tokenizer used here padding is 0 and the end of a name, </s>, is 1."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int
from numpy import ndarray
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerBase

from opendet_jax.errors import InputError

PADDING = 0
END = 1


class TokenizerError(InputError):
    """The configured tokenizer cannot be used, or a name cannot be written in it."""


class Tokenizer:
    """One of transformers' tokenizers, from `load_tokenizer`."""

    def __init__(self, inner: PreTrainedTokenizerBase):
        self._inner = inner
        self.size = len(inner)  # tokens it knows; the language model may have more, for rounder shapes

    def encode(self, name: str) -> list[int]:
        """The tokens of a name, without </s>."""
        return self._inner(name, add_special_tokens=False)["input_ids"]

    def decode(self, tokens: Int[ndarray, " n"] | Sequence[int]) -> str:
        """The name that tokens spell. Padding, </s> and other special tokens do not show, nor does space around it."""
        ids = [int(token) for token in tokens if token < self.size]
        return str(self._inner.decode(ids, skip_special_tokens=True)).strip()


def load_tokenizer(name: str, vocab_size: int) -> Tokenizer:
    """The tokenizer of `data.tokenizer`: "byt5" (bytes; needs no file), else a folder or a name on the hub.

    Raises TokenizerError if there is none, its padding is not 0 or its </s> not 1, or it has more tokens than the
    language model's `vocab_size` (V).
    """
    tokenizer = Tokenizer(_pretrained(name))
    if tokenizer.size > vocab_size:
        raise TokenizerError(
            f"data.tokenizer: {name!r} has {tokenizer.size} tokens, config.model.t5.vocab_size is {vocab_size}"
        )
    return tokenizer


def _pretrained(name: str) -> PreTrainedTokenizerBase:
    if name == "byt5":
        return ByT5Tokenizer()
    try:
        inner = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # which one depends on what is missing: folder, file, network, package
        raise TokenizerError(
            f"data.tokenizer: cannot load {name!r}; give 'byt5', a folder, or a name on the Hugging Face hub ({error})"
        ) from error
    if (inner.pad_token_id, inner.eos_token_id) != (PADDING, END):
        raise TokenizerError(
            f"data.tokenizer: {name!r} is not a T5 tokenizer: padding is {inner.pad_token_id} and </s> "
            f"{inner.eos_token_id}, not {PADDING} and {END}"
        )
    return inner


def encode_names(tokenizer: Tokenizer, names: Sequence[str], max_tokens: int) -> Int[ndarray, "n T"]:
    """Tokens of each name: cut to `max_tokens` = T with </s>, which ends every row, then padding; int32.

    Raises TokenizerError for a name that is empty or leaves no token.
    """
    rows = np.full((len(names), max_tokens), PADDING, np.int32)
    for row, name in zip(rows, names, strict=True):
        tokens = tokenizer.encode(name.strip())[: max_tokens - 1]
        if not tokens:
            raise TokenizerError(f"a name to learn must not be empty: {name!r}")
        row[: len(tokens) + 1] = [*tokens, END]
    return rows
