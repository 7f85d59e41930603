"""A list of names in the place of the names a model makes up: which of them an object has, in two ways.

By language: the name generator chooses among the names' tokens (model/beam_search.py, `Trie`), and the score of a
detection is objectness × the probability that the generator gives to the name. By alignment: the aligner, which
training uses alone, compares each query with the names' text embeddings (Eq. 2), and the score is objectness × σ(S).

Letters: N names, E text width.

Method: docs/method.md#beam-search, docs/method.md#13-evaluation.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from absl import logging
from jaxtyping import Float32, Int
from numpy import ndarray

from opendet_jax.config import Config
from opendet_jax.data.tokenizer import END, PADDING, load_tokenizer
from opendet_jax.errors import InputError

By: TypeAlias = Literal["language", "alignment"]
LISTED = 5  # names in a message


@dataclass(frozen=True, eq=False)
class AlignedNames:
    """Names that the aligner compares with objects."""

    names: tuple[str, ...]
    texts: Float32[ndarray, "N2 E"]  # their embeddings, and rows of zeros up to a power of two


@dataclass(frozen=True, eq=False)
class SpelledNames:
    """Names that the name generator chooses from."""

    names: tuple[str, ...]
    trie: Any  # a Trie
    name_of: dict[tuple[int, ...], str]  # by its tokens, without </s>
    length_of: dict[str, int]  # of each name its tokens, </s> included
    most_tokens: int  # of the longest, rounded up

    def decode(self, row: Int[ndarray, " n"]) -> str:
        """The name of a row of `Names.tokens`; of one that is no name, which has score −∞, an empty text."""
        tokens = row[1:].tolist()
        return self.name_of.get(tuple(tokens[: tokens.index(END)]), "") if END in tokens else ""


GivenNames: TypeAlias = AlignedNames | SpelledNames


def given_names(names: Sequence[str], by: By, config: Config) -> GivenNames:
    """The names, ready for `Inference`; one that is given twice counts once.

    Raises:
        TypeError: `names` is one text, or holds something else than texts.
        InputError: there is none, one is empty, `by` is neither "language" nor "alignment", the table of text
            embeddings lacks some (EmbeddingError), or two of them are one name in the language model's tokens.
    """
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"names is a list of names, not {names!r:.60}")
    if by not in get_args(By):
        raise InputError(f"by is {' or '.join(map(repr, get_args(By)))}, not {by!r:.40}")
    kept = tuple(dict.fromkeys(name.strip() for name in names))
    if not kept or "" in kept:
        raise InputError("names has an empty name" if kept else "names is empty: give at least one name")
    return _aligned(kept, config) if by == "alignment" else _spelled(kept, config)


def written_names(text: str) -> list[str] | None:
    """What commas or ends of lines separate in a text, as in `predict.names`; None where there is nothing."""
    return [name.strip() for name in re.split("[,\n]", text) if name.strip()] or None


def _aligned(names: tuple[str, ...], config: Config) -> AlignedNames:
    from opendet_jax.data.text_embeddings import make_embedder  # which what runs exported programs does without

    rows = make_embedder(config.data, config.model.text_width, config.eval.text_encoder).embed(names)
    texts = np.zeros((1 << (len(names) - 1).bit_length(), config.model.text_width), np.float32)
    texts[: len(names)] = rows
    return AlignedNames(names, texts)


def _spelled(names: tuple[str, ...], config: Config) -> SpelledNames:
    from opendet_jax.model.beam_search import make_trie  # as above

    tokenizer = load_tokenizer(config.data.tokenizer, config.model.t5.vocab_size)
    name_of: dict[tuple[int, ...], str] = {}
    unwritable = []
    for name in names:
        tokens = tuple(tokenizer.encode(name))
        if not tokens or {PADDING, END} & set(tokens):
            raise InputError(f"names: {name!r} cannot be written in the tokens of {config.data.tokenizer!r}")
        if tokens in name_of:
            same = f"{name_of[tokens]!r} and {name!r}"
            raise InputError(f"names: {same} are the same in the tokens of {config.data.tokenizer!r}")
        name_of[tokens] = name
        if tokenizer.decode(tokens) != name:
            unwritable.append(f"{name!r} as {tokenizer.decode(tokens)!r}")
    if unwritable:
        shown = ", ".join(unwritable[:LISTED]) + ", …" * (len(unwritable) > LISTED)
        logging.warning("%d of the given names are looked for as the model can write them: %s", len(unwritable), shown)
    length_of = {name: len(tokens) + 1 for tokens, name in name_of.items()}
    trie = make_trie([(*tokens, END) for tokens in name_of])
    return SpelledNames(names, trie, name_of, length_of, -(-max(length_of.values()) // 16) * 16)
