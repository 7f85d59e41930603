"""Reading PyTorch weights: .safetensors, .pth, .pt, .bin, a folder of these, or a name on the Hugging Face hub.

Nothing in a file is ever run: pickles are opened by torch's own reader of plain tensors, which refuses everything else.
"""

import hashlib
import json
import pickle
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from opendet_jax.errors import WeightsError

PICKLES = (".pth", ".pt", ".bin")
WHOLE_FILES = ("model.safetensors", "pytorch_model.bin")  # in a folder of Hugging Face's, in this order of preference
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "spiece.model", "vocab.json", "merges.txt")
DOWNLOADED = ("*.json", "*.safetensors", "*.bin", "*.model", "*.txt", "*.md")
CHUNK = 1 << 24  # bytes hashed at a time


@dataclass(frozen=True)
class Source:
    """Named tensors, and where they come from."""

    name: str  # as given
    files: tuple[Path, ...]
    state: Mapping[str, np.ndarray]
    config: Mapping[str, Any]  # config.json beside the weights, or empty
    licence: str  # as the model card beside the weights has it, or empty

    @property
    def folder(self) -> Path:
        return self.files[0].parent

    @property
    def has_tokenizer(self) -> bool:
        return any((self.folder / name).is_file() for name in TOKENIZER_FILES)


def read_source(name: str) -> Source:
    """Opens weights. Arrays are read from disk when used, where the format allows it.

    Raises:
        WeightsError: nothing is there, it is damaged or no file of weights, or it holds anything but tensors.
    """
    files = _files(name)
    state: dict[str, np.ndarray] = {}
    for path in files:
        state |= _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    if not state:
        raise WeightsError(f"{name}: holds no tensor")
    return Source(name, files, state, _json(files[0].parent / "config.json"), _licence(files[0].parent))


def checksum(files: Iterable[Path]) -> dict[str, str]:
    """SHA-256 of each file, by its name."""
    sums = {}
    for path in files:
        digest = hashlib.sha256()
        with path.open("rb") as file, tqdm(
            total=path.stat().st_size, desc=f"checksum {path.name}", unit="B", unit_scale=True, mininterval=1.0
        ) as bar:  # fmt: skip
            while chunk := file.read(CHUNK):
                digest.update(chunk)
                bar.update(len(chunk))
        sums[path.name] = digest.hexdigest()
    return sums


def _files(name: str) -> tuple[Path, ...]:
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix not in (".safetensors", *PICKLES):
            raise WeightsError(f"{name}: not a file of weights; they end in .safetensors, {', '.join(PICKLES)}")
        return (path,)
    if path.is_dir():
        return _files_of_folder(path)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not path.parent.is_dir():
        return _files_of_folder(_downloaded(name))
    raise WeightsError(f"{name}: no such file or folder, and no name on the Hugging Face hub")


def _downloaded(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(DOWNLOADED)))
    except Exception as error:  # which one depends on what is missing: network, repository, right to read it
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise WeightsError(f"{name}: no such folder, and the Hugging Face hub did not give it: {reason}") from error


def _files_of_folder(folder: Path) -> tuple[Path, ...]:
    for whole in WHOLE_FILES:
        if (folder / whole).is_file():
            return (folder / whole,)
        index = folder / f"{whole}.index.json"
        if index.is_file():
            shards = sorted(set(_json(index).get("weight_map", {}).values()))
            missing = [shard for shard in shards if not (folder / shard).is_file()]
            if missing or not shards:
                raise WeightsError(f"{index}: lists files that are not there: {', '.join(missing) or '(none at all)'}")
            return tuple(folder / shard for shard in shards)
    found = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", *PICKLES))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise WeightsError(f"{folder}: holds no {' or '.join(WHOLE_FILES)}, and not one file of weights but {names}")
    return (found[0],)


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        with safe_open(path, framework="flax") as file:  # unlike numpy, it knows bfloat16
            return {name: np.asarray(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: damaged, or not a safetensors file: {error}") from error


def _read_pickle(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError as error:
        raise WeightsError(
            f"{path}: reading {path.suffix} needs PyTorch; "
            "pip install torch --index-url https://download.pytorch.org/whl/cpu (a .safetensors file does not)"
        ) from error
    try:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):  # files of torch before 1.6 cannot be mapped
                raise
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path}: not a file of plain tensors: it is no checkpoint, or holds code, which is never run "
            f"({_first_line(error)})"
        ) from error
    except Exception as error:  # which one depends on where in the file the reader stumbles
        raise WeightsError(f"{path}: damaged, or not a PyTorch checkpoint: {_first_line(error)}") from error
    return {name: _numpy(tensor) for name, tensor in _model_part(path, content).items()}


def _model_part(path: Path, content: Any) -> Mapping[str, Any]:
    """The model's tensors in a training file, or the whole of a plain state dict."""
    if isinstance(content, Mapping):
        for key in ("model", "state_dict"):
            if isinstance(content.get(key), Mapping):
                return content[key]
        if content and all(hasattr(value, "shape") for value in content.values()):
            return content
        keys = ", ".join(map(str, content))
        raise WeightsError(f"{path}: holds {keys or 'nothing'}, but no 'model': a file of the optimizer's state only?")
    raise WeightsError(f"{path}: holds a {type(content).__name__}, not a dictionary of tensors")


def _numpy(tensor: Any) -> np.ndarray:
    if isinstance(tensor, np.ndarray):
        return tensor
    tensor = tensor.detach()
    return tensor.float().numpy() if str(tensor.dtype) == "torch.bfloat16" else tensor.numpy()


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WeightsError(f"{path}: is not json: {error}") from error


def _licence(folder: Path) -> str:
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    match = re.search(r"^license:\s*(\S+)\s*$", text, re.MULTILINE)
    return match.group(1) if match else ""


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
