"""What the commands of `python -m opendet_jax.weights` do. What can be known at once is checked first."""

import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from opendet_jax.checkpoints import folder as folders
from opendet_jax.checkpoints import hub, intact
from opendet_jax.checkpoints.restore import find_model, restore, workdir_of
from opendet_jax.config import CLIPTextConfig, Config
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
from opendet_jax.weights.source import Source, checksum, read_source
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
    folders.copy_tokenizer(source.folder, target)
    return target


def parameter_count(params: Mapping[str, Any]) -> int:
    return sum(int(np.prod(leaf.shape)) for leaf in flat(params).values())


def inspect_command(name: str, every: bool) -> None:
    """Prints a table of modules (or, with `every`, of tensors) with shapes, numbers and bytes."""
    path = find_model(name)
    if (path / folders.NOTE).exists() or intact.steps(path / folders.CHECKPOINTS):
        note = folders.read_note(path)
        arrays = flat(folders.load(path, note["kind"]).params)
        for key, value in note.items():
            print(f"# {key}: {value}")
    else:
        source = read_source(name if path == Path(name) else str(path))
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


def export_command(folder: Path | str, layout: str, out: Path) -> None:
    """A whole model (a workdir's newest checkpoint too), a Swin or a T5 into one file of PyTorch's names."""
    if out.suffix not in (".safetensors", ".pth"):
        raise WeightsError(f"{out}: the file must end in .safetensors or .pth")
    _check_new(out)
    if out.suffix == ".pth" and find_spec("torch") is None:
        raise WeightsError(f"{out}: writing .pth needs PyTorch; a .safetensors file does not")
    params = _exportable(find_model(folder), layout)
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


def portable_command(folder: Path | str, out: Path, dtype: str) -> None:
    """A whole model as config.json, model.safetensors and its tokenizer, which `opendet_jax.load` reads."""
    folders.check_free(out)
    config, params, step = restore(folder)
    lacking, tokenizer = "", None
    with tempfile.TemporaryDirectory() as temporary:
        try:
            tokenizer = _tokenizer_files(config, Path(temporary) / folders.TOKENIZER)
        except (TokenizerError, WeightsError) as error:
            lacking = f"the tokenizer is not in it, and must be there where it is loaded: {printable(error)}"
        folders.save_portable(out, folders.Converted("opendet", config.to_dict(), params), step, dtype, tokenizer)
    size = (out / folders.MODEL).stat().st_size
    print(f"wrote {out}: {parameter_count(params):,} parameters of step {step} in {dtype}, {size / 2**20:.1f} MiB")
    if lacking:
        print(lacking)


def _tokenizer_files(config: Config, target: Path) -> Path | None:
    """The files of `data.tokenizer` in a new folder; None of bytes, which have none.

    Raises TokenizerError, or WeightsError of the hub, where they cannot be had or are not a tokenizer by themselves.
    """
    name = config.data.tokenizer
    if name == "byt5":
        return None
    there = Path(name) if Path(name).is_dir() else hub.fetch(hub.Name(name), (), folders.TOKENIZER_FILES)
    folders.copy_tokenizer(there, target)
    try:
        load_tokenizer(str(target), config.model.t5.vocab_size)
    except TokenizerError as error:
        raise TokenizerError(f"data.tokenizer = {name!r}: {' '.join(str(error).split())}") from error
    return target


def push_command(folder: str, name: str, licence: str, private: bool, revision: str) -> None:
    """A model in the portable form, with a card, into a repository of the Hugging Face hub."""
    model = _hub_name(name)
    if revision and model.revision:
        raise WeightsError(f"--revision {revision}: {name} names one already")
    model = hub.parse(f"{model}@{quote(revision, safe='')}") if revision else model
    own = find_model(folder)
    config, params, step = restore(own)
    portable = folders.is_portable(own)
    stated = "" if portable else folders.read_note(own).get("licence", NOT_STATED)
    if stated not in ("", NOT_STATED) and licence.casefold() != stated.casefold():
        raise WeightsError(f"--licence {licence!r}: {own / folders.NOTE} says {stated!r}")
    evaluations = hub.find_metrics(workdir_of(folder), step)
    dtype = _dtype(own) if portable else "float32"
    with tempfile.TemporaryDirectory() as temporary:
        tokenizer = _tokenizer_files(config, Path(temporary) / folders.TOKENIZER)
        told = {section: fields for section, fields in config.to_dict().items() if section != "mesh"}
        whole, out = folders.Converted("opendet", _without_places(told), params), Path(temporary) / "model"
        folders.save_portable(out, whole, step, dtype, tokenizer)
        card = hub.card(model, config, step, parameter_count(params), dtype, licence, evaluations)
        (out / folders.CARD).write_text(card, encoding="utf-8")
        size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        print(f"pushing {folder}, steps: {hub.steps(config, step)}; {size / 2**20:.1f} MiB to {model}", flush=True)
        at = hub.push(out, model, private, f"{config.name}, step {step}", f"{folders.TOKENIZER}/*")
    print(f"pushed: {at}\nopendet_jax.load({str(model)!r}) loads it")


def pull_command(name: str, out: Path) -> None:
    """A model of the Hugging Face hub into a folder of its own."""
    model = _hub_name(name)
    folders.check_free(out)
    if out.is_dir() and any(out.iterdir()):
        raise WeightsError(f"{out}: already holds files; give another folder")
    folders.copy_portable(find_model(str(model)), out)
    print(f"wrote {out}: {', '.join(sorted(path.name for path in out.iterdir()))}")


def _hub_name(name: str) -> hub.Name:
    return hub.parse(name if hub.is_name(name) else f"hf://{name}")


def _dtype(folder: Path) -> str:
    """In which the numbers of a portable model lie."""
    with safe_open(folder / folders.MODEL, "numpy") as file:
        kinds = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    return "bfloat16" if kinds == {"BF16"} else "float32"


def _without_places(values: Any) -> Any:
    """A config whose files and folders have their names alone, where it says where they lie on this machine."""
    if isinstance(values, dict):
        return {key: _without_places(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [_without_places(value) for value in values]
    if not isinstance(values, str):
        return values
    return "\n".join(Path(line).name if line.startswith(("/", "~")) else line for line in values.split("\n"))


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
