"""The names that a table of text embeddings is to have: from a list, or as training reads them in annotations."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from opendet_jax.data.datasets import read_annotations
from opendet_jax.data.formats.json_source import readable_name
from opendet_jax.data.text_embeddings import table_key
from opendet_jax.errors import WeightsError
from opendet_jax.weights.unwrap import some


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
        # No picture is opened: where they lie does not matter.
        dataset, problems = read_annotations(path, Path(path).parent, field)
        found = dataset.names()
        names.update(found)
        notes.append(f"{path}: {len(found)} names in {len(dataset)} images")
        if problems.counts:
            notes.append(f"{path}: {problems}")
    if not names:
        raise WeightsError(f"{some(annotations)}: no box has a name")
    return _merged(sorted(names), notes)
