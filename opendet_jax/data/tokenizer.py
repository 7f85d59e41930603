"""Names ↔ tokens of the language model. In every tokenizer used here padding is 0 and the end of a name, </s>, is 1.

Method: docs/method.md#7-object-name-generator.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, reduce
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from absl import logging
from jaxtyping import Int
from numpy import ndarray

from opendet_jax.config import DataConfig
from opendet_jax.data.formats.records import Record
from opendet_jax.errors import InputError

PADDING = 0
END = 1
LISTED = 10  # names that do not come back
LONGEST = 60  # characters of a name in a message


# What transformers does to a text where tokenizer_config.json has clean_up_tokenization_spaces, as T5's does.
_JOINED = (".", "?", "!", ",", "' ", "n't", "'m", "'s", "'ve", "'re")
CLEANED = tuple((f" {mark}", mark.strip()) for mark in _JOINED)


class TokenizerError(InputError):
    """The configured tokenizer cannot be used, or a name cannot be written in it."""


@runtime_checkable
class Tokenizer(Protocol):
    size: int  # tokens it knows; the language model may have more, for rounder shapes

    def encode(self, name: str) -> list[int]:
        """The tokens of a name, without </s>."""
        ...

    def decode(self, tokens: Int[ndarray, " n"] | Sequence[int]) -> str:
        """The name that tokens spell. Padding, </s> and other special tokens do not show, nor does space around it."""
        ...


class ByteTokenizer:
    """ByT5's tokens (Xue et al., 2022): three special ones, the 256 bytes of UTF-8, 125 that no name has.

    As transformers' ByT5Tokenizer has them, whose loading takes seconds, and PyTorch along wherever that is installed.
    """

    size = 384
    _FIRST = 3  # the token of byte 0

    def encode(self, name: str) -> list[int]:
        return [byte + self._FIRST for byte in name.encode()]

    def decode(self, tokens: Int[ndarray, " n"] | Sequence[int]) -> str:
        letters = bytes(int(token) - self._FIRST for token in tokens if 0 <= token - self._FIRST < 256)
        return letters.decode(errors="ignore").strip()


class T5Tokenizer:
    """A T5's tokenizer.json, read by the library underneath transformers, whose own loading takes seconds more."""

    def __init__(self, file: Path, cleans: bool):
        from tokenizers import Tokenizer

        self._inner, self._cleans = Tokenizer.from_file(str(file)), cleans
        # The file has those of the last call before it was saved; transformers sets them anew at each of its own.
        self._inner.no_padding()
        self._inner.no_truncation()
        self.size = self._inner.get_vocab_size()
        self._encode = cache(lambda name: self._inner.encode(name, add_special_tokens=False).ids)

    def encode(self, name: str) -> list[int]:
        return list(self._encode(name))

    def decode(self, tokens: Int[ndarray, " n"] | Sequence[int]) -> str:
        text = self._inner.decode([int(token) for token in tokens if token < self.size], skip_special_tokens=True)
        return reduce(lambda text, mark: text.replace(*mark), CLEANED if self._cleans else (), text).strip()


class PretrainedTokenizer:
    """One of transformers' tokenizers."""

    def __init__(self, inner: Any):
        self._inner = inner
        self.size = len(inner)
        self._encode = cache(lambda name: inner(name, add_special_tokens=False)["input_ids"])

    def encode(self, name: str) -> list[int]:
        return list(self._encode(name))

    def decode(self, tokens: Int[ndarray, " n"] | Sequence[int]) -> str:
        ids = [int(token) for token in tokens if token < self.size]
        return str(self._inner.decode(ids, skip_special_tokens=True)).strip()


def load_tokenizer(name: str, vocab_size: int, download: bool = True) -> Tokenizer:
    """The tokenizer of `data.tokenizer`: "byt5" (bytes; needs no file), else a folder or a name on the hub.

    Unless `download`, one that is not on this machine is none, and the hub is not asked.

    Raises TokenizerError if there is none, its padding is not 0 or its </s> not 1, or it has more tokens than the
    language model's `vocab_size` (V).
    """
    tokenizer = ByteTokenizer() if name == "byt5" else _t5(Path(name)) or _pretrained(name, download)
    if tokenizer.size > vocab_size:
        raise TokenizerError(
            f"data.tokenizer: {name!r} has {tokenizer.size} tokens, config.model.t5.vocab_size is {vocab_size}"
        )
    return tokenizer


def _t5(folder: Path) -> T5Tokenizer | None:
    """Of a folder that says it is a T5's tokenizer, with all that its tokenizer.json leaves open; None of another."""
    try:
        described = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        marks = [described[name] for name in ("pad_token", "eos_token")]
        is_t5 = described["tokenizer_class"] in ("T5Tokenizer", "T5TokenizerFast")
        tokenizer = T5Tokenizer(folder / "tokenizer.json", described.get("clean_up_tokenization_spaces", False) is True)
    except Exception:  # of many kinds: transformers says what is wrong, or knows how to read it
        return None
    found = [tokenizer._inner.token_to_id(mark if isinstance(mark, str) else "") for mark in marks]
    return tokenizer if is_t5 and found == [PADDING, END] else None


def _pretrained(name: str, download: bool) -> PretrainedTokenizer:
    from transformers import AutoTokenizer  # slow, and needed here alone

    try:
        # Told no, as it would ask at the terminal whether a tokenizer's own code is to run.
        inner = AutoTokenizer.from_pretrained(name, local_files_only=not download, trust_remote_code=False)
    except Exception as error:  # which one depends on what is missing: folder, file, network, package
        raise TokenizerError(
            f"data.tokenizer: cannot load {name!r}; give 'byt5', a folder, or a name on the Hugging Face hub ({error})"
        ) from error
    if (inner.pad_token_id, inner.eos_token_id) != (PADDING, END):
        raise TokenizerError(
            f"data.tokenizer: {name!r} is not a T5 tokenizer: padding is {inner.pad_token_id} and </s> "
            f"{inner.eos_token_id}, not {PADDING} and {END}"
        )
    return PretrainedTokenizer(inner)


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


@dataclass(frozen=True)
class Lost:
    """A name that is not what its tokens spell."""

    name: str
    spelt: str  # what they spell
    tokens: int  # of the whole name, </s> included
    cut: bool  # whether that is because there is no room for all of them
    boxes: int  # that have it

    def __str__(self) -> str:
        if self.cut:
            return f"{_short(self.name)} is cut off to {_short(self.spelt)}, it has {self.tokens} tokens"
        return f"{_short(self.name)} becomes {_short(self.spelt)}"


@dataclass(frozen=True)
class LostNames:
    """What of a data set cannot be written in a tokenizer's tokens, the names of the most boxes first."""

    names: tuple[Lost, ...]
    all_names: int
    boxes: int  # that have one of them
    all_boxes: int

    def describe(self, tokenizer: str, max_tokens: int) -> str:
        """Lines: how many they are, the first of them, what to do."""
        share = self.boxes / max(1, self.all_boxes)
        lines = [
            f"{len(self.names):,} of {self.all_names:,} names, of {self.boxes:,} of {self.all_boxes:,} boxes "
            f"({share:.2%}), cannot be learnt: with data.tokenizer = {tokenizer!r} and data.max_name_tokens = "
            f"{max_tokens} their tokens spell something else",
            *(f"  {lost}" for lost in self.names[:LISTED]),
        ]
        if len(self.names) > LISTED:
            lines.append(f"  … and {len(self.names) - LISTED:,} more")
        if not all(lost.cut for lost in self.names):
            lines.append("data.tokenizer = 'byt5' can write every letter (docs/data.md)")
        if any(lost.cut for lost in self.names):
            most = max(lost.tokens for lost in self.names if lost.cut)
            lines.append(f"data.max_name_tokens = {most} has room for those that are cut off")
        return "\n".join(lines)


def lost_names(records: Iterable[Record], tokenizer: Tokenizer, max_tokens: int) -> LostNames:
    """The names for which decode(encode(name)) is not the name, cut to `max_tokens` = T with </s>.

    Spaces at its ends do not count, and several in a row are one: neither do they in evaluation. All else does: "½"
    that comes back as "12" is another name. Each different name is tried once.
    """
    boxes = Counter(names for record in records for names in record.names)
    of_name = Counter[str]()
    for names, count in boxes.items():
        for name in set(names):
            of_name[name] += count
    found = []
    for name, count in sorted(of_name.items(), key=lambda item: (-item[1], item[0])):
        tokens = tokenizer.encode(name.strip())
        spelt = tokenizer.decode(tokens[: max_tokens - 1])
        if _spaced(spelt) != _spaced(name):
            cut = len(tokens) >= max_tokens and _spaced(tokenizer.decode(tokens)) == _spaced(name)
            found.append(Lost(name, spelt, len(tokens) + 1, cut, count))
    lost = {entry.name for entry in found}
    concerned = sum(count for names, count in boxes.items() if not lost.isdisjoint(names)) if lost else 0
    return LostNames(tuple(found), len(of_name), concerned, boxes.total())


def check_names(records: Iterable[Record], tokenizer: Tokenizer, config: DataConfig, where: str) -> None:
    """Says which names cannot be learnt, in one warning that begins with `where`.

    Raises TokenizerError where more than the share `data.max_unwritable` of the boxes has such a name.
    """
    lost = lost_names(records, tokenizer, config.max_name_tokens)
    if not lost.names:
        return
    said = f"{where}: {lost.describe(config.tokenizer, config.max_name_tokens)}"
    if lost.boxes > config.max_unwritable * lost.all_boxes:
        raise TokenizerError(f"{said}\ndata.max_unwritable = {config.max_unwritable:g} allows fewer boxes")
    logging.warning("%s", said)


def warn_of_long_names(records: Iterable[Record], tokenizer: Tokenizer, most: int, where: str) -> None:
    """Says which names have more than `most` = `eval.max_new_tokens` tokens, so that none of them can be generated."""
    cut = [lost for lost in lost_names(records, tokenizer, most + 1).names if lost.cut]
    if cut:
        shown = [_short(lost.name) for lost in cut[:LISTED]] + ["…"] * (len(cut) > LISTED)
        logging.warning(
            "%s: %d names have more than eval.max_new_tokens = %d tokens and cannot be found; %d has room for them: %s",
            *(where, len(cut), most, max(lost.tokens for lost in cut), ", ".join(shown)),
        )


def _spaced(name: str) -> str:
    return " ".join(name.split())


def _short(name: str) -> str:
    return repr(name if len(name) <= LONGEST else name[: LONGEST - 1] + "…")
