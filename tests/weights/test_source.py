"""Reading files: the formats people have, and one clear error for everything else."""

import hashlib
import json

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from opendet_jax.errors import WeightsError
from opendet_jax.weights import source as module
from opendet_jax.weights.source import checksum, read_source

ARRAYS = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.float32([1.5])}


def assert_arrays(state) -> None:
    assert set(state) == set(ARRAYS)
    for name, value in ARRAYS.items():
        np.testing.assert_array_equal(state[name], value)


def tensors() -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value.copy()) for name, value in ARRAYS.items()}


@pytest.mark.parametrize("wrap", [lambda t: t, lambda t: {"model": t, "iteration": 3}, lambda t: {"state_dict": t}])
@pytest.mark.parametrize("name", ["w.pth", "w.pt", "pytorch_model.bin"])
def test_pickles(tmp_path, wrap, name):
    torch.save(wrap(tensors()), tmp_path / name)
    assert_arrays(read_source(str(tmp_path / name)).state)
    assert_arrays(read_source(str(tmp_path)).state)


def test_the_format_of_old_torch(tmp_path):
    torch.save(tensors(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert_arrays(read_source(str(tmp_path / "old.pth")).state)


def test_safetensors_and_what_lies_beside(tmp_path):
    save_file(ARRAYS, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"d_model": 3}')
    (tmp_path / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n# A model\n")
    source = read_source(str(tmp_path))
    assert_arrays(source.state)
    assert (source.config, source.licence, source.has_tokenizer) == ({"d_model": 3}, "apache-2.0", False)
    content = (tmp_path / "model.safetensors").read_bytes()
    assert checksum(source.files) == {"model.safetensors": hashlib.sha256(content).hexdigest()}


def test_shards(tmp_path):
    for number, (name, value) in enumerate(ARRAYS.items()):
        save_file({name: value}, tmp_path / f"model-{number}.safetensors")
    weight_map = {name: f"model-{number}.safetensors" for number, name in enumerate(ARRAYS)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_arrays(read_source(str(tmp_path)).state)
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"lists files that are not there: model-1\.safetensors"):
        read_source(str(tmp_path))


def test_bfloat16(tmp_path):
    half = {"x": np.float32([1.0, 2.5]).astype(ml_dtypes.bfloat16)}
    save_file(half, tmp_path / "model.safetensors")
    torch.save({"x": torch.tensor([1.0, 2.5], dtype=torch.bfloat16)}, tmp_path / "x.pth")
    for name in ("model.safetensors", "x.pth"):
        np.testing.assert_array_equal(read_source(str(tmp_path / name)).state["x"].astype(np.float32), [1.0, 2.5])


class Malicious:
    def __reduce__(self):
        return (print, ("this must never run",))


def bad_files(folder) -> dict[str, str]:
    """name → what the error says."""
    whole = folder / "whole.pth"
    torch.save({"model": {"w": torch.zeros(1000)}}, whole)
    (folder / "cut.pth").write_bytes(whole.read_bytes()[:-900])
    save_file({"w": np.zeros(1000, np.float32)}, folder / "whole.safetensors")
    (folder / "cut.safetensors").write_bytes((folder / "whole.safetensors").read_bytes()[:-900])
    (folder / "text.pth").write_text("hello")
    (folder / "empty.pth").write_bytes(b"")
    (folder / "text.safetensors").write_text("hello, not a tensor")
    (folder / "notes.txt").write_text("hello")
    torch.save({"optimizer": {"state": {}}, "iteration": 7}, folder / "optimizer.pth")
    torch.save({"model": Malicious()}, folder / "code.pth")
    torch.save([1, 2], folder / "list.pth")
    return {
        "cut.pth": "damaged, or not a PyTorch checkpoint",
        "cut.safetensors": "damaged, or not a safetensors file",
        "text.pth": "not a PyTorch checkpoint",
        "empty.pth": "damaged, or not a PyTorch checkpoint",
        "text.safetensors": "damaged, or not a safetensors file",
        "notes.txt": "not a file of weights; they end in .safetensors, .pth, .pt, .bin",
        "optimizer.pth": "holds optimizer, iteration, but no 'model': a file of the optimizer's state only?",
        "code.pth": "holds code, which is never run",
        "list.pth": "holds a list, not a dictionary of tensors",
        "absent.pth": "no such file or folder",
    }


def test_bad_files(tmp_path, capsys):
    for name, message in bad_files(tmp_path).items():
        with pytest.raises(WeightsError) as error:
            read_source(str(tmp_path / name))
        assert message in str(error.value), name
        assert name in str(error.value)
    assert "never run" not in capsys.readouterr().out


def test_a_folder_without_weights(tmp_path):
    with pytest.raises(WeightsError, match="not one file of weights but none"):
        read_source(str(tmp_path))


def test_the_hub_says_no(monkeypatch):
    def refuse(name, **_):
        raise OSError(f"cannot reach {name}\nlong trace")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(WeightsError, match=r"google/flan-t5-base: no such folder, and the Hugging Face.*: cannot"):
        read_source("google/flan-t5-base")


def test_the_hub_gives_a_folder(tmp_path, monkeypatch):
    save_file(ARRAYS, tmp_path / "model.safetensors")
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: asked.append(name) or str(tmp_path))
    assert_arrays(read_source("someone/model").state)
    assert asked == ["someone/model"]


def test_torch_is_optional(tmp_path, monkeypatch):
    torch.save(tensors(), tmp_path / "w.pth")
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(WeightsError, match=r"needs PyTorch; pip install torch"):
        read_source(str(tmp_path / "w.pth"))
    save_file(ARRAYS, tmp_path / "w.safetensors")
    assert_arrays(module.read_source(str(tmp_path / "w.safetensors")).state)
