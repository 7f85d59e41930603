"""Training files as trainers write them: the model is found in what surrounds it, and what was taken is said."""

import argparse
import pathlib
import types
import warnings
from collections import OrderedDict

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_tensors

from opendet_jax.errors import WeightsError
from opendet_jax.weights import source as source_module
from opendet_jax.weights.source import read_source
from opendet_jax.weights.unwrap import model_of, printable, without_wrapper

MODEL = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1.5])}
AVERAGE = {name: tensor + 1 for name, tensor in MODEL.items()}
OPTIMIZER = {"state": {0: {"exp_avg": torch.zeros(2, 3), "step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1}]}
PATH = f"{pathlib.PurePosixPath.__module__}.PurePosixPath"  # Python 3.13 has it in pathlib._local
OPTIONS = argparse.Namespace(lr=0.1, resume="", nested=argparse.Namespace(epochs=3))


def read(content, path, **how) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    torch.save(content, path, **how)
    source = read_source(str(path))
    return dict(source.state), source.notes


def is_model(state) -> bool:
    return set(state) == set(MODEL) and all(np.array_equal(state[name], MODEL[name].numpy()) for name in MODEL)


@pytest.mark.parametrize(
    ("content", "note"),
    [
        ({"model": MODEL, "optimizer": OPTIMIZER, "epoch": 3, "args": OPTIONS}, "'model' was taken; beside it: opt"),
        ({"model": MODEL, "ema": AVERAGE}, "'model' was taken; beside it: ema"),
        ({"ema": AVERAGE, "model": MODEL}, "'model' was taken; beside it: ema"),
        ({"model": MODEL, "model_ema": AVERAGE, "args": OPTIONS}, "'model' was taken; beside it: model_ema, args"),
        ({"state_dict": MODEL, "state_dict_ema": AVERAGE}, "'state_dict' was taken; beside it: state_dict_ema"),
        ({"model_state_dict": MODEL, "loss": torch.tensor(0.1)}, "'model_state_dict' was taken; beside it: loss"),
        ({"module": OrderedDict(MODEL), "optimizer": None}, "'module' was taken; beside it: optimizer"),
        ({"model": {"state_dict": MODEL, "step": 3}}, "'state_dict' was taken; beside it: step"),
        ({"ema": MODEL, "args": OPTIONS}, "the moving average 'ema' was taken, as there is no other model"),
        ({"ema_state_dict": MODEL, "epoch": 1}, "the moving average 'ema_state_dict' was taken"),
        ({"ema": {"module": MODEL, "updates": 9}}, "'module' was taken; beside it: updates"),
        ({"modelEMA": MODEL, "optim": OPTIMIZER}, "the moving average 'modelEMA' was taken"),
        ({"student": MODEL, "optimizer": {"w": torch.zeros(1)}}, "'student' was taken; beside it: optimizer"),
        ({**MODEL, "epoch": 3}, "left out, as they are no tensors: epoch"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("zipped", [True, False])
def test_the_model_is_found(tmp_path, content, note, zipped):
    state, notes = read(content, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    assert is_model(state)
    assert any(line.startswith(note) for line in notes), notes


def test_a_plain_file_needs_no_words(tmp_path):
    for name in ("x.pth", "x.ckpt", "model_best.pth.tar", "x.bin"):
        state, notes = read(MODEL, tmp_path / name)
        assert is_model(state)
        assert notes == ()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"teacher": MODEL, "student": AVERAGE}, "holds 2 dictionaries of tensors, and none is called 'model': te"),
        ({"optimizer": OPTIMIZER, "epoch": 3}, "holds optimizer, epoch, but no 'model'"),
        ({"ema": {"shadow_params": [torch.zeros(3)]}, "args": OPTIONS}, "holds ema, args, but no 'model'"),
        (OPTIONS, "holds a Namespace, not a dictionary of tensors"),
        ({"model": {0: torch.zeros(2)}}, "holds tensors that have numbers for names: 0"),
        ({}, "holds nothing, but no 'model'"),
        ({"model": MODEL, "args": argparse.Namespace(out=pathlib.PurePosixPath("x"))}, f"holds {PATH}"),
        ({"model": MODEL, "best": np.float64(0.3)}, "holds numpy"),
        ({"model": MODEL, "args": types.SimpleNamespace(lr=1)}, "holds types.SimpleNamespace, and not only tensors"),
        (torch.nn.Linear(2, 2), "holds torch.nn.modules.linear.Linear"),
        ({"model": {"w": torch.zeros(2, 2).to_sparse()}}, "w is a torch.float32 tensor that cannot be read"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("zipped", [True, False])
def test_what_was_found_is_said_without_terminal_codes(tmp_path, content, message, zipped):
    with pytest.raises(WeightsError) as error:
        read(content, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    assert message in str(error.value)
    assert "x.pth" in str(error.value)
    assert str(error.value).isprintable()


def test_a_namespace_runs_nothing(tmp_path):
    """The options are let through, and what hides among them is not."""

    class Hidden:
        def __reduce__(self):
            return (print, ("this must never run",))

    torch.save({"model": MODEL, "args": argparse.Namespace(evil=Hidden())}, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match="it holds code, which is never run"):
        read_source(str(tmp_path / "x.pth"))
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


def test_torchscript_is_named(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated; its files remain
        torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "x.pt")
    with pytest.raises(WeightsError, match=r"x\.pt: is a TorchScript archive, which is code"):
        read_source(str(tmp_path / "x.pt"))


def test_numbers_of_eight_bits_are_named(tmp_path):
    eight = {"w": torch.zeros(2).to(torch.float8_e4m3fn)}
    save_tensors(eight, tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match=r"x\.safetensors: holds numbers that cannot be read \(float8\?\)"):
        read_source(str(tmp_path / "x.safetensors"))
    with pytest.raises(WeightsError, match=r"x\.pth: w is a torch\.float8_e4m3fn tensor that cannot be read"):
        read(eight, tmp_path / "x.pth")


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_files_that_cannot_be_opened_are_not_called_damaged(tmp_path, monkeypatch, name):
    def refuse(path, **_):
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / name).write_bytes(b"")
    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(source_module, "safe_open", refuse)
    with pytest.raises(WeightsError, match=f"{name}: cannot be read: Permission denied"):
        read_source(str(tmp_path / name))


@pytest.mark.parametrize("name", ["zipped.pth", "old.pth", "x.safetensors"])
def test_damage_anywhere_is_one_clear_error(tmp_path, name):
    """Bytes changed and files cut at many places: what is read has the shapes, or it is an error of that file."""
    path = tmp_path / name
    if name == "x.safetensors":
        save_file({key: tensor.numpy() for key, tensor in MODEL.items()}, path)
    else:
        content = {"model": MODEL, "args": OPTIONS}
        torch.save(content, path, _use_new_zipfile_serialization=name == "zipped.pth")
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    messages = []
    for trial in range(150):
        place = int(rng.integers(len(whole)))
        changed = bytearray(whole)
        changed[place] ^= int(rng.integers(1, 256))
        path.write_bytes(whole[:place] if trial % 3 == 0 else changed)
        try:
            state = read_source(str(path)).state
        except WeightsError as error:
            messages.append(str(error))
        else:
            assert all(np.asarray(value).size < 100 for value in state.values())
    assert len(messages) > 50
    assert all(name in message and message.isprintable() for message in messages)


def test_a_dictionary_within_itself_ends(tmp_path):
    loop = {"epoch": 3}
    loop["model"] = loop
    with pytest.raises(WeightsError, match="holds epoch, model, but no 'model'"):
        model_of(loop, "x.pth")


def test_codes_of_terminals_do_not_get_through():
    assert printable("\x1b[1mbold\x1b[0m\x1b]0;title\x07\n\t") == "bold]0;title???"
    with pytest.raises(WeightsError) as error:
        model_of({"\x1b[31mred\x1b[0m": 3}, "x.pth")
    assert "holds red, but" in str(error.value)


def test_shards_do_not_repeat_each_other(tmp_path):
    for number in (1, 2):
        save_file({"w": np.float32([number])}, tmp_path / f"model-{number}.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"w": "model-1.safetensors", "v": "model-2.safetensors"}}')
    with pytest.raises(WeightsError, match=r"model-2\.safetensors: holds what another file beside it holds too: w"):
        read_source(str(tmp_path))
    for text, message in (
        ('{"weight_map": {"w": "../model-1.safetensors"}}', "'weight_map' gives w to '../model-1.safetensors'"),
        ('{"weight_map": {"w": 3}}', "'weight_map' gives w to 3"),
        ('{"weight_map": []}', "'weight_map' is a list"),
        ("[1]", "is a list, not an object"),
        ("{", "is not json"),
    ):
        index.write_text(text)
        with pytest.raises(WeightsError, match=message):
            read_source(str(tmp_path))


ANCHORS = ("stem.weight", "patch.weight")


@pytest.mark.parametrize("wrapper", ["module.", "model.", "module.model.", "_orig_mod.", "backbone."])
def test_wrappers_before_names(wrapper):
    state = {f"{wrapper}stem.weight": 1, f"{wrapper}last": 2}
    found = without_wrapper(state, ANCHORS, "x")
    assert found.state == {"stem.weight": 1, "last": 2}
    assert found.notes == (f"2 names are read without the '{wrapper}' before them",)


def test_other_parts_are_left_out_and_said():
    state = {"module.stem.weight": 1, "module.last": 2, "n_averaged": 3, "criterion.weight": 4}
    found = without_wrapper(state, ANCHORS, "x")
    assert found.state == {"stem.weight": 1, "last": 2}
    assert found.notes[1] == "left out, as 'module.' is not before them: 2 (n_averaged, criterion.weight)"


def test_the_model_is_preferred_to_its_average():
    state = {"ema_model.stem.weight": 1, "model.stem.weight": 2}
    assert without_wrapper(state, ANCHORS, "x").state == {"stem.weight": 2}
    assert without_wrapper({"ema.stem.weight": 1}, ANCHORS, "x").state == {"stem.weight": 1}
    with pytest.raises(WeightsError, match=r"x: holds 2 models, before whose names stands student\., teacher\."):
        without_wrapper({"student.stem.weight": 1, "teacher.stem.weight": 2}, ANCHORS, "x")


def test_names_without_wrapper_stay():
    for state in ({"stem.weight": 1, "model.other": 2}, {"nothing": 1}, {"system.weight": 1}):
        assert without_wrapper(state, ANCHORS, "x") == (state, ())
