"""What the commands of `python -m opendet_jax.weights` do. What can be known at once is checked first."""

import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from opendet_jax.checkpoints import folder as folders
from opendet_jax.checkpoints import intact
from opendet_jax.checkpoints.restore import restore
from opendet_jax.config import CLIPTextConfig
from opendet_jax.data.tokenizer import TokenizerError, load_tokenizer
from opendet_jax.errors import WeightsError
from opendet_jax.files import replacing, try_folder
from opendet_jax.weights.convert import convert, export, merged
from opendet_jax.weights.embed_names import (
    check_table,
    check_tokenizer,
    embed_names,
    load_text_encoder,
    open_tokenizer,
    read_annotated,
    read_names,
)
from opendet_jax.weights.rules import flat
from opendet_jax.weights.source import TOKENIZER_FILES, Source, checksum, read_source
from opendet_jax.weights.unwrap import printable, some

NOT_STATED = "not stated"
ANY_SIZE = 2**31  # tokens: the tokenizer is looked for before the size of the vocabulary is known


def convert_command(kind: str, name: str, out: Path, tokenizer: str, licence: str) -> None:
    """Reads, converts, and only then writes."""
    folders.check_free(out)
    tokenizer = str(Path(tokenizer).resolve()) if Path(tokenizer).is_dir() and tokenizer else tokenizer
    size = _tokenizer_size(kind, tokenizer)
    started = time.monotonic()
    print(f"reading {name}", flush=True)
    source = read_source(name)
    if licence and source.licence and licence != source.licence:
        raise WeightsError(f"--licence {licence!r}: the model card beside {name} says {source.licence!r}")
    try:
        conversion = convert(kind, source, tokenizer)
    except WeightsError as error:
        raise WeightsError(f"{name}: {error}") from error
    converted = conversion.converted
    if kind == "opendet" and tokenizer and size > (vocabulary := converted.config["model"]["t5"]["vocab_size"]):
        raise WeightsError(f"--tokenizer {tokenizer}: has {size} tokens, the model {vocabulary}")
    for line in conversion.describe():
        print(line)
    count = parameter_count(converted.params)
    print(f"{count:,} parameters", flush=True)
    note = {
        "source": name,
        "files": checksum(source.files),
        "licence": licence or source.licence or NOT_STATED,
        "parameters": count,
        "tensors_used": conversion.used,
        "tensors_left_out": {why: len(names) for why, names in conversion.left_out.items()},
        "notes": list(conversion.notes),
    }
    with tempfile.TemporaryDirectory() as folder:
        copied = _write_tokenizer(source, tokenizer, converted, Path(folder)) if kind == "clip" else None
        folders.save(out, converted, note, copied)
    print(f"wrote {out} in {time.monotonic() - started:.0f} s; licence of the source: {note['licence']}")


def _tokenizer_size(kind: str, tokenizer: str) -> int:
    """Of the tokenizer that is asked for (0: none is). Raises WeightsError where it is not there, or has no use."""
    if not tokenizer:
        return 0
    if kind == "clip":
        return len(open_tokenizer(tokenizer))
    if kind != "opendet":
        raise WeightsError(f"--tokenizer {tokenizer}: weights of kind {kind!r} keep none; training has data.tokenizer")
    try:
        return load_tokenizer(tokenizer, ANY_SIZE).size
    except TokenizerError as error:
        raise WeightsError(f"--tokenizer {tokenizer}: {' '.join(printable(error).split())}") from error


def _write_tokenizer(source: Source, tokenizer: str, converted: folders.Converted, target: Path) -> Path | None:
    """Fills `target` with CLIP's tokenizer, the one that is asked for or the source's own; None where there is none."""
    if tokenizer:
        inner = open_tokenizer(tokenizer)
        check_tokenizer(inner, CLIPTextConfig(**converted.config), tokenizer)
        inner.save_pretrained(target)
        return target
    if not source.has_tokenizer:
        print("no tokenizer lies beside the source: embed-names and evaluation will need one (--tokenizer)")
        return None
    for name in TOKENIZER_FILES:
        if (source.folder / name).is_file():
            shutil.copyfile(source.folder / name, target / name)
    return target


def parameter_count(params: Mapping[str, Any]) -> int:
    return sum(int(np.prod(leaf.shape)) for leaf in flat(params).values())


def inspect_command(name: str, every: bool) -> None:
    """Prints a table of modules (or, with `every`, of tensors) with shapes, numbers and bytes."""
    path = Path(name)
    if (path / folders.NOTE).exists() or intact.steps(path / folders.CHECKPOINTS):
        note = folders.read_note(path)
        arrays = flat(folders.load(path, note["kind"]).params)
        for key, value in note.items():
            print(f"# {key}: {value}")
    else:
        source = read_source(name)
        arrays = dict(source.state)
        print(f"# files: {', '.join(str(file) for file in source.files)}")
        print(f"# licence: {source.licence or NOT_STATED}")
        for line in source.notes:
            print(f"# {line}")
    for line in describe_arrays(arrays, every):
        print(printable(line))


def describe_arrays(arrays: Mapping[str, Any], every: bool) -> list[str]:
    """Lines of "name  shape  dtype" or of "module  tensors  numbers", and the sum."""
    if every:
        lines = [
            f"{name}  {'×'.join(map(str, value.shape)) or 'scalar'}  {value.dtype}" for name, value in arrays.items()
        ]
    else:
        tensors: Counter[str] = Counter()
        numbers: Counter[str] = Counter()
        for name, value in arrays.items():
            parts = name.replace("/", ".").split(".")
            module = ".".join(parts[: min(3, max(1, len(parts) - 1))])
            tensors[module] += 1
            numbers[module] += int(np.prod(value.shape))
        lines = [f"{module}  {tensors[module]} tensors  {numbers[module]:,} numbers" for module in tensors]
    total = sum(int(np.prod(value.shape)) for value in arrays.values())
    size = sum(int(np.prod(value.shape)) * value.dtype.itemsize for value in arrays.values())
    return [*lines, f"# {len(arrays)} tensors, {total:,} numbers, {size / 2**20:,.1f} MiB"]


def export_command(folder: Path, layout: str, out: Path) -> None:
    """A whole model (a workdir's newest checkpoint too), a Swin or a T5 into one file of PyTorch's names."""
    if out.suffix not in (".safetensors", ".pth"):
        raise WeightsError(f"{out}: the file must end in .safetensors or .pth")
    _check_new(out)
    if out.suffix == ".pth" and find_spec("torch") is None:
        raise WeightsError(f"{out}: writing .pth needs PyTorch; a .safetensors file does not")
    params = _exportable(folder, layout)
    state = export(params, layout)
    with replacing(out) as part:
        if out.suffix == ".safetensors":
            try:
                save_file(state, part, metadata={"format": "pt"})
            except SafetensorError as error:
                raise WeightsError(f"{out}: cannot be written: {error}") from error
        else:
            import torch

            torch.save({"model": {name: torch.tensor(value) for name, value in state.items()}}, part)
    print(f"wrote {out}: {len(state)} tensors")


def portable_command(folder: Path, out: Path, dtype: str) -> None:
    """A whole model as config.json and model.safetensors, which `opendet_jax.load` reads."""
    folders.check_free(out)
    config, params, step = restore(folder)
    folders.save_portable(out, folders.Converted("opendet", config.to_dict(), params), step, dtype)
    size = (out / folders.MODEL).stat().st_size
    print(f"wrote {out}: {parameter_count(params):,} parameters of step {step} in {dtype}, {size / 2**20:.1f} MiB")
    if config.data.tokenizer != "byt5":
        print(f"the tokenizer is not in it: {config.data.tokenizer} must be there where it is loaded")


def _check_new(out: Path) -> None:
    """Raises WeightsError where a file is there already, or could not be written."""
    try:
        if out.exists() or out.is_symlink():
            raise WeightsError(f"{out}: is there already; give another name")
        try_folder(out.parent)
    except OSError as error:
        raise WeightsError(f"{out}: cannot be written: {error.strerror}") from error


def _exportable(folder: Path, layout: str) -> Mapping[str, Any]:
    """The parameters that a layout names, out of a whole model or of a part of one."""
    part = layout.removesuffix("_hugging_face")
    if folders.read_note(folder)["kind"] != "opendet":
        return folders.load(folder, part).params
    whole = folders.load(folder, "opendet")
    if part == "t5":
        return merged(whole.params["name_generator"]["t5"], whole.config["model"]["t5"]["lora_scale"])
    return whole.params["backbone"] if part == "swin" else whole.params


def embed_command(
    names: Path | None,
    annotations: Sequence[str],
    fields: Sequence[str],
    encoder: Path,
    tokenizer: str,
    out: Path,
) -> None:
    """`names`: a list in a file; None: the names of the boxes in `annotations`, taken from `fields`."""
    check_table(out)
    note = folders.read_note(encoder)
    listed = read_names(names) if names is not None else read_annotated(annotations, fields)
    for line in listed.notes:
        print(line, flush=True)
    text_encoder = load_text_encoder(encoder, tokenizer)
    cut = text_encoder.cut(listed.names)
    if cut:
        print(f"{len(cut)} names are longer than CLIP reads, and cut: {some(cut)}", flush=True)
    embed_names(listed.names, text_encoder, out, made_by=str(note.get("files")))
    print(f"wrote {out} and {out.with_suffix('.json')}: {len(listed.names)} names")
