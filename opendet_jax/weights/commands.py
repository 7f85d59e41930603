"""What the commands of `python -m opendet_jax.weights` do."""

import shutil
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from opendet_jax.checkpoints import folder as folders
from opendet_jax.checkpoints import intact
from opendet_jax.errors import WeightsError
from opendet_jax.files import replacing
from opendet_jax.weights.convert import LICENCES, convert, export, merged
from opendet_jax.weights.embed_names import TOKENIZER, embed_names, load_text_encoder, read_names
from opendet_jax.weights.rules import flat
from opendet_jax.weights.source import TOKENIZER_FILES, Source, checksum, read_source


def convert_command(kind: str, name: str, out: Path, tokenizer: str, licence: str) -> None:
    """Reads, converts, and only then writes."""
    folders.check_free(out)
    started = time.monotonic()
    print(f"reading {name}", flush=True)
    source = read_source(name)
    converted = convert(kind, source, tokenizer)
    count = parameter_count(converted.params)
    print(f"{len(source.state)} tensors fit: {count:,} parameters", flush=True)
    note = {
        "source": name,
        "files": checksum(source.files),
        "licence": licence or source.licence or LICENCES[kind],
        "parameters": count,
    }
    folders.save(out, converted, note)
    if kind == "clip" and source.has_tokenizer:
        _copy_tokenizer(source, out / TOKENIZER)
    print(f"wrote {out} in {time.monotonic() - started:.0f} s; licence of the source: {note['licence']}")


def _copy_tokenizer(source: Source, target: Path) -> None:
    target.mkdir()
    for name in TOKENIZER_FILES:
        if (source.folder / name).is_file():
            shutil.copyfile(source.folder / name, target / name)


def parameter_count(params: Mapping[str, Any]) -> int:
    return sum(int(np.prod(leaf.shape)) for leaf in flat(params).values())


def inspect_command(name: str, every: bool) -> None:
    """Prints a table of modules (or, with `every`, of tensors) with shapes, numbers and bytes."""
    path = Path(name)
    if intact.steps(path / folders.CHECKPOINTS):
        note = folders.read_note(path)
        arrays = flat(folders.load(path, note["kind"]).params)
        for key, value in note.items():
            print(f"# {key}: {value}")
    else:
        source = read_source(name)
        arrays = dict(source.state)
        print(f"# files: {', '.join(str(file) for file in source.files)}")
        print(f"# licence: {source.licence or 'not stated beside the file'}")
    for line in describe_arrays(arrays, every):
        print(line)


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
    params = _exportable(folder, layout)
    state = export(params, layout)
    with replacing(out) as part:
        if out.suffix == ".safetensors":
            save_file(state, part, metadata={"format": "pt"})
        else:
            import torch

            torch.save({"model": {name: torch.tensor(value) for name, value in state.items()}}, part)
    print(f"wrote {out}: {len(state)} tensors")


def _exportable(folder: Path, layout: str) -> Mapping[str, Any]:
    """The parameters that a layout names, out of a whole model or of a part of one."""
    part = layout.removesuffix("_hugging_face")
    if folders.read_note(folder)["kind"] != "opendet":
        return folders.load(folder, part).params
    whole = folders.load(folder, "opendet")
    if part == "t5":
        return merged(whole.params["name_generator"]["t5"], whole.config["model"]["t5"]["lora_scale"])
    return whole.params["backbone"] if part == "swin" else whole.params


def embed_command(names: Path, encoder: Path, tokenizer: str, out: Path) -> None:
    listed = read_names(names)
    note = folders.read_note(encoder)
    embed_names(listed, load_text_encoder(encoder, tokenizer), out, made_by=str(note["files"]))
    print(f"wrote {out} and {out.with_suffix('.json')}: {len(listed)} names")
