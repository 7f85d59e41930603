"""Reading PyTorch weights: .safetensors, .pth, .pt, .bin, a folder of these, or a name on the Hugging Face hub.

Nothing in a file is ever run: pickles are opened by torch's own reader of plain tensors, which refuses everything else
(but a Namespace, which only holds values).
"""

import argparse
import hashlib
import json
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from opendet_jax.checkpoints.folder import TOKENIZER_FILES
from opendet_jax.errors import WeightsError
from opendet_jax.weights.unwrap import Found, model_of, printable, some

PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".pth.tar")
WHOLE_FILES = ("model.safetensors", "pytorch_model.bin")  # in a folder of Hugging Face's, in this order of preference
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
    notes: tuple[str, ...] = ()  # what was decided on the way to the tensors, to be said

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
    notes: list[str] = []
    for path in files:
        found = Found(_read_safetensors(path), ()) if path.suffix == ".safetensors" else _read_pickle(path)
        twice = state.keys() & found.state.keys()
        if twice:
            raise WeightsError(f"{path}: holds what another file beside it holds too: {some(sorted(twice))}")
        state |= found.state
        notes += found.notes
    if not state:
        raise WeightsError(f"{name}: holds no tensor")
    folder = files[0].parent
    return Source(name, files, state, _json(folder / "config.json"), _licence(folder), tuple(notes))


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
    if not name.strip():
        raise WeightsError("the source is empty: name a file, a folder, or a model on the Hugging Face hub")
    if path.is_file():
        if not _is_of_weights(path):
            raise WeightsError(f"{name}: not a file of weights; they end in .safetensors, {', '.join(PICKLES)}")
        return (path,)
    if path.is_dir():
        return _files_of_folder(path)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not path.parent.is_dir():
        return _files_of_folder(_downloaded(name))
    raise WeightsError(f"{name}: no such file or folder, and no name on the Hugging Face hub")


def _is_of_weights(path: Path) -> bool:
    return path.is_file() and path.name.endswith((".safetensors", *PICKLES))


def _downloaded(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(DOWNLOADED)))
    except Exception as error:  # which one depends on what is missing: network, repository, right to read it
        raise WeightsError(
            f"{name}: no such folder, and the Hugging Face hub did not give it: {first_line(error)}"
        ) from error


def _files_of_folder(folder: Path) -> tuple[Path, ...]:
    for whole in WHOLE_FILES:
        if (folder / whole).is_file():
            return (folder / whole,)
        index = folder / f"{whole}.index.json"
        if index.is_file():
            shards = _shards(index)
            missing = [shard for shard in shards if not (folder / shard).is_file()]
            if missing or not shards:
                raise WeightsError(f"{index}: lists files that are not there: {some(missing) or '(none at all)'}")
            return tuple(folder / shard for shard in shards)
    found = sorted(path for path in folder.iterdir() if _is_of_weights(path))
    if not found and (folder / "checkpoints").is_dir():
        raise WeightsError(f"{folder}: holds checkpoints of this program, whole or begun, and no weights of others")
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise WeightsError(f"{folder}: holds no {' or '.join(WHOLE_FILES)}, and not one file of weights but {names}")
    return (found[0],)


def _shards(index: Path) -> list[str]:
    """The files that an index lists, each a name beside it."""
    weight_map = _json(index).get("weight_map", {})
    if not isinstance(weight_map, dict):
        raise WeightsError(f"{index}: 'weight_map' is a {type(weight_map).__name__}, not an object")
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise WeightsError(f"{index}: 'weight_map' gives {printable(tensor)} to {file!r:.80}, no file beside it")
    return sorted(set(weight_map.values()))


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        with safe_open(path, framework="flax") as file:  # unlike numpy, it knows bfloat16
            return {name: np.asarray(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    except PermissionError as error:
        raise WeightsError(f"{path}: cannot be read: {error.strerror}") from error
    except (TypeError, KeyError, AttributeError) as error:  # of kinds that NumPy does not have
        raise WeightsError(f"{path}: holds numbers that cannot be read (float8?): {first_line(error)}") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(f"{path}: damaged, or not a safetensors file: {first_line(error)}") from error


def _read_pickle(path: Path) -> Found:
    try:
        import torch
    except ImportError as error:
        raise WeightsError(
            f"{path}: reading {path.suffix} needs PyTorch; "
            "pip install torch --index-url https://download.pytorch.org/whl/cpu (a .safetensors file does not)"
        ) from error
    if _is_torchscript(path):
        raise WeightsError(f"{path}: is a TorchScript archive, which is code: save the model's state_dict() instead")
    try:
        # Of what is more than tensors only a Namespace is let through, the options of the trainer: it holds values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            try:
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:
                if "mmap can only be used" not in str(error):  # files of torch before 1.6 cannot be mapped
                    raise
                content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(_refusal(path, error)) from error
    except PermissionError as error:
        raise WeightsError(f"{path}: cannot be read: {error.strerror}") from error
    except Exception as error:  # which one depends on where in the file the reader stumbles
        raise WeightsError(f"{path}: damaged, or not a PyTorch checkpoint: {first_line(error)}") from error
    found = model_of(content, str(path))
    return Found({name: _numpy(path, name, tensor) for name, tensor in found.state.items()}, found.notes)


def _is_torchscript(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(PurePosixPath(name).name == "constants.pkl" for name in archive.namelist())
    except Exception:  # no archive, or a damaged one: torch's reader will say so
        return False


def _refusal(path: Path, error: Exception) -> str:
    """What torch would not open, in a line: its own message is long, coloured, and advises to open it all the same."""
    import torch

    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            kinds = set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # the format of old torch: the message names the first
        kinds = set(re.findall(r"GLOBAL (\S+) was not", str(error)))
    if not kinds:
        return f"{path}: damaged, or not a PyTorch checkpoint: {first_line(error)}"
    return (
        f"{path}: holds {some(sorted(kinds))}, and not only tensors: it holds code, which is never run; "
        "where you trust the file, open it with PyTorch and save the model's state_dict() alone"
    )


def _numpy(path: Path, name: str, tensor: Any) -> np.ndarray:
    if isinstance(tensor, np.ndarray):
        return tensor
    try:
        tensor = tensor.detach()
        return tensor.float().numpy() if str(tensor.dtype) == "torch.bfloat16" else tensor.numpy()
    except (RuntimeError, TypeError, AttributeError, NotImplementedError) as error:  # sparse, quantised, on no device
        kind = f"{getattr(tensor, 'dtype', '?')} tensor"
        raise WeightsError(f"{path}: {printable(name)} is a {kind} that cannot be read: {first_line(error)}") from error


def _json(path: Path) -> dict[str, Any]:
    """An object in a file; empty where there is none."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: is not json: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: is a {type(content).__name__}, not an object of fields")
    return content


def _licence(folder: Path) -> str:
    """What the head of the model card says; empty where there is no card, or it says nothing."""
    from huggingface_hub import metadata_load

    card = folder / "README.md"
    try:
        head = (metadata_load(card) if card.is_file() else None) or {}
    except Exception:  # of the reader of yaml, or of the file: a text that is no card says nothing
        head = {}
    licence = head.get("license") or ""
    if licence == "other":
        licence = head.get("license_name") or licence
    return ", ".join(map(str, licence)) if isinstance(licence, list) else str(licence)


def first_line(error: Exception) -> str:
    """The first line of an error's message, in letters that show."""
    return printable((str(error).strip().splitlines() or [type(error).__name__])[0])
