"""A table of text embeddings for training and evaluation: one row for "a " + each name, by CLIP's text tower."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int
from tqdm import tqdm

from opendet_jax.checkpoints.folder import TOKENIZER, load
from opendet_jax.compilation import compiler_options
from opendet_jax.config import CLIPTextConfig, split_of
from opendet_jax.data.datasets import read_annotations
from opendet_jax.data.formats.json_source import readable_name
from opendet_jax.data.formats.label_folders import label_form
from opendet_jax.data.text_embeddings import table_key
from opendet_jax.errors import WeightsError
from opendet_jax.files import try_folder, write_json
from opendet_jax.model.clip_text import CLIPText
from opendet_jax.weights.source import first_line
from opendet_jax.weights.unwrap import some

BATCH = 64


class TextEncoder:
    """Any string to its unit embedding. Rows of a batch are padded to a few lengths, each compiled once."""

    LENGTHS = (8, 16, 32, 77)  # tokens

    def __init__(self, config: CLIPTextConfig, params: Any, tokenizer: Any):
        self.config = config
        self._tokenizer = tokenizer
        self._params = params
        self._encode = jax.jit(self._unit_embeddings, compiler_options=compiler_options(jax.default_backend()))

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

    def cut(self, names: Sequence[str]) -> list[str]:
        """The names of which the tower does not read the end."""
        longest = self.config.max_tokens
        found = self._tokenizer([text_of(name) for name in names], truncation=True, max_length=longest + 1)["input_ids"]
        return [name for name, tokens in zip(names, found, strict=True) if len(tokens) > longest]

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


def text_of(name: str) -> str:
    """What is embedded of a name."""
    return f"a {name}"


def load_text_encoder(folder: Path, tokenizer: str = "") -> TextEncoder:
    """The text tower converted into `folder`; its tokenizer lies beside it, or is given as a folder or hub name.

    Raises WeightsError where one of them is missing, or they do not belong together.
    """
    converted = load(folder, "clip")
    name = tokenizer or str(folder / TOKENIZER)
    if not tokenizer and not Path(name).is_dir():
        raise WeightsError(f"{folder}: holds no tokenizer; give --tokenizer a folder or a name on the Hugging Face hub")
    config, inner = CLIPTextConfig(**converted.config), open_tokenizer(name)
    check_tokenizer(inner, config, name)
    return TextEncoder(config, converted.params, inner)


def open_tokenizer(name: str) -> Any:
    """A folder's tokenizer, or one on the hub. Raises WeightsError."""
    try:
        from transformers import AutoTokenizer  # slow, and needed here alone

        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # which one depends on what is missing
        raise WeightsError(f"cannot load the tokenizer {name!r}: {first_line(error)}") from error


def check_tokenizer(tokenizer: Any, config: CLIPTextConfig, name: str) -> None:
    """Raises WeightsError where the tower would not find the end of this tokenizer's texts, or not know its tokens."""
    tokens = tokenizer(text_of("b"))["input_ids"]
    last, size = (tokens[-1] if tokens else None), len(tokenizer)
    if size > config.vocab_size:
        raise WeightsError(f"the tokenizer {name!r} has {size} tokens, the text tower {config.vocab_size}")
    # A config of 2 means the largest token (model/clip_text.py).
    if last != (max(tokens, default=None) if config.end_token == 2 else config.end_token):
        raise WeightsError(
            f"the tokenizer {name!r} is of another model: it ends a text with {last}, not CLIP's end token"
        )


@dataclass(frozen=True)
class _Partial:
    """A table in the making: rows on disk, and how many of them are done, for which names and encoder."""

    rows: Path
    note: Path

    @staticmethod
    def of(out: Path) -> "_Partial":
        return _Partial(out.with_suffix(".part.npy"), out.with_suffix(".part.json"))

    def done(self, expected: dict[str, Any], shape: tuple[int, int]) -> int:
        """How many rows need not be made again: none where what is there is damaged, or of other names."""
        try:
            note = json.loads(self.note.read_text(encoding="utf-8"))
            rows = np.load(self.rows, mmap_mode="r", allow_pickle=False)
            fits = note["of"] == expected and (rows.shape, rows.dtype) == (shape, np.float32)
            return int(note["done"]) if fits else 0
        except (OSError, ValueError, TypeError, KeyError):
            return 0


def check_table(out: Path) -> None:
    """Raises WeightsError where a table cannot be written, or would replace a file (but of one in the making)."""
    if out.suffix != ".npy":
        raise WeightsError(f"{out}: the table's name must end in .npy")
    names = out.with_suffix(".json")
    try:
        for path in (out, names):
            if path.exists() and not (path == names and _Partial.of(out).note.is_file()):
                raise WeightsError(f"{path}: is there already; give the table another name")
        try_folder(out.parent)
    except OSError as error:
        raise WeightsError(f"{out}: cannot be written: {error.strerror}") from error


def embed_names(names: Sequence[str], encoder: TextEncoder, out: Path, made_by: str) -> None:
    """Writes `out` (.npy, float32 unit rows) and the names beside it (.json). Interrupted, it goes on where it was."""
    check_table(out)
    partial = _Partial.of(out)
    listed = hashlib.sha256("\n".join(names).encode()).hexdigest()
    of = {"names_sha256": listed, "encoder": made_by, "width": encoder.width}
    shape = (len(names), encoder.width)
    done = partial.done(of, shape)
    out.parent.mkdir(parents=True, exist_ok=True)
    if done:
        rows = np.lib.format.open_memmap(partial.rows, mode="r+")
    else:
        partial.note.unlink(missing_ok=True)  # of another table, whose rows are gone now
        rows = np.lib.format.open_memmap(partial.rows, mode="w+", dtype=np.float32, shape=shape)
    with tqdm(total=len(names), initial=done, desc="embed", unit="name") as bar:
        for start in range(done, len(names), BATCH):
            chunk = names[start : start + BATCH]
            rows[start : start + len(chunk)] = encoder([text_of(name) for name in chunk])
            rows.flush()
            write_json(partial.note, {"of": of, "done": start + len(chunk)}, indent=None)
            bar.update(len(chunk))
    del rows
    write_json(out.with_suffix(".json"), list(names))
    partial.rows.replace(out)
    partial.note.unlink()


class Listed(NamedTuple):
    """Names, no two of which are looked up alike, and what was said of them, a line each."""

    names: list[str]
    notes: tuple[str, ...]


def _merged(names: Iterable[str], notes: Sequence[str]) -> Listed:
    """Of names that are looked up alike the first; the others are counted."""
    first: dict[str, str] = {}
    merged = [name for name in names if first.setdefault(table_key(name), name) is not name]
    more = [f"{len(merged)} names are others again (but for capitals and space around them): {some(merged)}"]
    return Listed(list(first.values()), (*notes, *(more if merged else ())))


def read_names(path: Path) -> Listed:
    """One name a line, or a json list of strings; underscores are spaces, as in the names of categories.

    Raises WeightsError for another form, or an empty name in the json.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        names = json.loads(text) if path.suffix == ".json" else [line for line in text.splitlines() if line.strip()]
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: cannot be read as names: {error}") from error
    if isinstance(names, dict):
        raise WeightsError(f"{path}: must be a list of names; those in annotations are read by --annotations")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name.strip() for name in names):
        raise WeightsError(f"{path}: must be a list of names, none of them empty")
    readable = [readable_name(name) for name in names]
    spaced = [name for name in names if "_" in name]
    notes = [f"{len(spaced)} names have spaces in the place of underscores: {some(spaced)}"] if spaced else []
    return _merged(readable, notes)


def read_annotated(annotations: Sequence[str], fields: Sequence[str]) -> Listed:
    """Every name of a box in annotations of any form that training reads, as training reads it, sorted.

    `fields`: the data sets' `name_field`, none, one for all, or one for each.
    Raises AnnotationError, and WeightsError where no box has a name or the numbers of files and fields differ.
    """
    if len(fields) not in (0, 1, len(annotations)):
        raise WeightsError(
            f"--name_field: {len(fields)} fields for {len(annotations)} annotations; give one, or as many"
        )
    each = list(fields) if len(fields) == len(annotations) else [*fields, ""][:1] * len(annotations)
    names, notes = set(), []
    for path, field in zip(annotations, each, strict=True):
        # Where pictures lie does not matter: none is opened, but for the sizes that YOLO's labels lack.
        images = "" if label_form(split_of(path)[0]) else Path(path).parent
        dataset, problems = read_annotations(path, images, field)
        found = dataset.names()
        names.update(found)
        notes.append(f"{path}: {len(found)} names in {len(dataset)} images")
        if problems.counts:
            notes.append(f"{path}: {problems}")
    if not names:
        raise WeightsError(f"{some(annotations)}: no box has a name")
    return _merged(sorted(names), notes)
