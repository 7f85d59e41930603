"""A table of text embeddings for training and evaluation: one row for "a " + each name, by CLIP's text tower."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int
from tqdm import tqdm
from transformers import AutoTokenizer

from opendet_jax.checkpoints.folder import load
from opendet_jax.config import CLIPTextConfig
from opendet_jax.errors import WeightsError
from opendet_jax.files import write_json
from opendet_jax.model.clip_text import CLIPText

TOKENIZER = "tokenizer"  # folder beside the weights
BATCH = 64


class TextEncoder:
    """Any string to its unit embedding. Rows of a batch are padded to a few lengths, each compiled once."""

    LENGTHS = (8, 16, 32, 77)  # tokens

    def __init__(self, config: CLIPTextConfig, params: Any, tokenizer: Any):
        self.config = config
        self._tokenizer = tokenizer
        self._params = params
        self._encode = jax.jit(self._unit_embeddings)

    def _unit_embeddings(self, params: Any, tokens: Int[Array, "R T"]) -> Float[Array, "R E"]:
        rows: Any = CLIPText(self.config).apply({"params": params}, tokens)
        return rows / jnp.linalg.norm(rows, axis=-1, keepdims=True)

    @property
    def width(self) -> int:
        return self.config.text_width

    def __call__(self, texts: Sequence[str]) -> Float32[np.ndarray, "n E"]:
        """Texts longer than the tower's positions are cut, as CLIP's own tokenizer cuts them."""
        rows = []
        for start in range(0, len(texts), BATCH):
            chunk = list(texts[start : start + BATCH])
            tokens = self._tokens(chunk)
            rows.append(np.asarray(self._encode(self._params, tokens))[: len(chunk)])
        return np.concatenate(rows) if rows else np.zeros((0, self.width), np.float32)

    def _tokens(self, texts: list[str]) -> np.ndarray:
        longest = self.config.max_tokens
        found = self._tokenizer(texts, truncation=True, max_length=longest)["input_ids"]
        needed = max(map(len, found))
        length = next((n for n in self.LENGTHS if needed <= n <= longest), longest)
        # After the end token nothing matters: 0 is as good as any. Missing rows are copies of the last.
        tokens = np.zeros((BATCH, length), np.int32)
        for row in range(BATCH):
            ids = found[min(row, len(found) - 1)]
            tokens[row, : len(ids)] = ids
        return tokens


def load_text_encoder(folder: Path, tokenizer: str = "") -> TextEncoder:
    """The text tower converted into `folder`; its tokenizer lies beside it, or is given as a folder or hub name.

    Raises WeightsError where one of them is missing.
    """
    converted = load(folder, "clip")
    name = tokenizer or str(folder / TOKENIZER)
    if not tokenizer and not Path(name).is_dir():
        raise WeightsError(f"{folder}: holds no tokenizer; give --tokenizer a folder or a name on the Hugging Face hub")
    try:
        inner = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # which one depends on what is missing
        raise WeightsError(f"cannot load the tokenizer {name!r}: {error}") from error
    return TextEncoder(CLIPTextConfig(**converted.config), converted.params, inner)


def read_names(path: Path) -> list[str]:
    """One name a line, or a json list of strings. Raises WeightsError for another form, an empty or repeated name."""
    try:
        text = path.read_text(encoding="utf-8")
        names = json.loads(text) if path.suffix == ".json" else [line for line in text.splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path}: cannot be read as names: {error}") from error
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name.strip() for name in names):
        raise WeightsError(f"{path}: must be a list of names, none of them empty")
    repeated = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if repeated:
        raise WeightsError(f"{path}: names occur more than once: {', '.join(map(repr, repeated[:10]))}")
    return names


@dataclass(frozen=True)
class _Partial:
    """A table in the making: rows on disk, and how many of them are done, for which names and encoder."""

    rows: Path
    note: Path

    def done(self, expected: dict[str, Any]) -> int:
        if not (self.rows.is_file() and self.note.is_file()):
            return 0
        note = json.loads(self.note.read_text(encoding="utf-8"))
        return note["done"] if note["of"] == expected else 0


def embed_names(names: Sequence[str], encoder: TextEncoder, out: Path, made_by: str) -> None:
    """Writes `out` (.npy, float32 unit rows) and the names beside it (.json). Interrupted, it goes on where it was."""
    if out.suffix != ".npy":
        raise WeightsError(f"{out}: the table's name must end in .npy")
    partial = _Partial(out.with_suffix(".part.npy"), out.with_suffix(".part.json"))
    listed = hashlib.sha256("\n".join(names).encode()).hexdigest()
    of = {"names_sha256": listed, "encoder": made_by, "width": encoder.width}
    done = partial.done(of)
    out.parent.mkdir(parents=True, exist_ok=True)
    shape = (len(names), encoder.width)
    if done:
        rows = np.lib.format.open_memmap(partial.rows, mode="r+")
    else:
        rows = np.lib.format.open_memmap(partial.rows, mode="w+", dtype=np.float32, shape=shape)
    with tqdm(total=len(names), initial=done, desc="embed", unit="name") as bar:
        for start in range(done, len(names), BATCH):
            chunk = names[start : start + BATCH]
            rows[start : start + len(chunk)] = encoder([f"a {name}" for name in chunk])
            rows.flush()
            write_json(partial.note, {"of": of, "done": start + len(chunk)}, indent=None)
            bar.update(len(chunk))
    del rows
    write_json(out.with_suffix(".json"), list(names))
    partial.rows.replace(out)
    partial.note.unlink()
