"""The commands given what they cannot use: a line that names it, before anything is read, and nothing half-written."""

import json
from dataclasses import asdict
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from opendet_jax.checkpoints import folder as folders
from opendet_jax.checkpoints.folder import Converted, load, read_note, save
from opendet_jax.config import CLIPTextConfig, SwinConfig
from opendet_jax.errors import WeightsError
from opendet_jax.model.clip_text import clip_text_shapes
from opendet_jax.weights import commands, embed_names
from opendet_jax.weights.__main__ import main
from opendet_jax.weights.convert import swin_shapes
from opendet_jax.weights.embed_names import load_text_encoder
from opendet_jax.weights.rules import nested

SWIN = SwinConfig(8, (1, 1, 1, 1), (1, 1, 1, 1), 2)
CLIP = CLIPTextConfig(width=16, num_layers=1, num_heads=2, ffn_width=16, text_width=8)


def fill(shapes) -> dict:
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> Path:
    """Converted folders: swin, and clip without a tokenizer."""
    folder = tmp_path_factory.mktemp("ours")
    save(folder / "swin", Converted("swin", asdict(SWIN), nested(fill(swin_shapes(SWIN)))), {"licence": "mit"})
    rng = np.random.default_rng(0)
    clip = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), clip_text_shapes(CLIP))
    save(folder / "clip", Converted("clip", asdict(CLIP), clip), {"files": {}})
    return folder


@pytest.fixture(scope="module")
def theirs(ours, tmp_path_factory) -> Path:
    """A Swin's file, as its authors lay it out."""
    file = tmp_path_factory.mktemp("theirs") / "swin.safetensors"
    main(["export", str(ours / "swin"), "--to", "swin", "--out", str(file)])
    return file


def error_of(*arguments: object) -> str:
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    message = str(stopped.value)
    assert message.startswith("error: ")
    assert len(message.splitlines()) == 1
    assert message.isprintable()
    return message


def never(*_, **__):
    raise AssertionError("what is expensive must not begin")


UNWRITABLE = Path("/proc/no_folder")  # where nobody, not even root, can make anything


def test_convert_looks_at_its_output_first(theirs, ours, tmp_path, monkeypatch):
    monkeypatch.setattr(commands, "read_source", never)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "tokens" / "tokenizer").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    for out, message in (
        (ours / "swin", "already holds weights"),
        (tmp_path / "tokens", "already holds weights"),
        (tmp_path / "file", "no weights can be written there: File exists"),
        (tmp_path / "file" / "below", "no weights can be written there: Not a directory"),
        (UNWRITABLE, "no weights can be written there"),
        (tmp_path / ("x" * 300), "no weights can be written there: File name too long"),
    ):
        assert message in error_of("convert", "--from", "swin", "--source", theirs, "--out", out), out
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "file").read_text() == "mine"


def test_convert_looks_at_its_tokenizer_first(theirs, tmp_path, monkeypatch, data_folder):
    monkeypatch.setattr(commands, "read_source", never)
    nowhere = tmp_path / "nowhere"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for kind, tokenizer, message in (
        ("swin", nowhere, "weights of kind 'swin' keep none"),
        ("t5", data_folder / "tokenizers" / "t5", "weights of kind 't5' keep none"),
        ("opendet", nowhere, f"--tokenizer {nowhere}: "),
        ("opendet", data_folder / "tokenizers" / "clip", "is not a T5 tokenizer"),
        ("clip", nowhere, f"cannot load the tokenizer '{nowhere}'"),
    ):
        arguments = ("--source", theirs, "--out", tmp_path / "out", "--tokenizer", tokenizer)
        assert message in error_of("convert", "--from", kind, *arguments), kind
    assert not (tmp_path / "out").exists()


def test_convert_names_what_it_cannot_read(ours, theirs, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "gone.safetensors").symlink_to(tmp_path / "nothing")
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "model.safetensors").write_bytes(theirs.read_bytes())
    (tmp_path / "torn" / "config.json").write_text("{")
    for source, message in (
        (tmp_path / "absent.pth", "absent.pth: no such file or folder"),
        ("", "the source is empty"),
        (empty, "empty: holds no model.safetensors"),
        (tmp_path / "notes.txt", "notes.txt: not a file of weights"),
        (tmp_path / "folder.safetensors", "folder.safetensors: holds no model.safetensors"),
        (tmp_path / "gone.safetensors", "gone.safetensors: no such file"),
        (ours / "swin", "swin: holds checkpoints of this program, whole or begun"),
        (tmp_path / "torn", "config.json: is not json"),
    ):
        out = ("--out", tmp_path / "out")
        assert message in error_of("convert", "--from", "swin", "--source", source, *out), source
        assert not (tmp_path / "out").exists()
    for kind in ("opendet", "t5", "clip"):
        message = error_of("convert", "--from", kind, "--source", theirs, "--out", tmp_path / "out")
        assert f"{theirs}: not " in message
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("there", [True, False])
def test_a_disk_that_fails_leaves_nothing(theirs, tmp_path, monkeypatch, there):
    out = tmp_path / "out"
    if there:
        out.mkdir()
        (out / "mine.txt").write_text("mine")
    write_json = folders.write_json

    def full(path, content):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(folders, "write_json", full)
    message = error_of("convert", "--from", "swin", "--source", theirs, "--out", out)
    assert "No space left on device" in message
    assert [path.name for path in tmp_path.rglob("*")] == (["out", "mine.txt"] if there else [])
    monkeypatch.setattr(folders, "write_json", write_json)
    main(["convert", "--from", "swin", "--source", str(theirs), "--out", str(out)])
    assert load(out, "swin").config["embed_dim"] == 8


def test_licences_are_those_that_are_stated(theirs, tmp_path):
    """Of the card's head only, where `license` is a field."""
    folder = tmp_path / "hub"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(theirs.read_bytes())
    for number, (card, given, licence) in enumerate(
        (
            (None, "", "not stated"),
            (None, "mit", "mit"),
            ("---\nlicense: apache-2.0\n---\n# Swin\n", "", "apache-2.0"),
            ("---\nlicense: 'mit'\n---\n", "mit", "mit"),
            ("---\nlicense: [mit, cc0-1.0]\n---\n", "", "mit, cc0-1.0"),
            ("---\nlicense: other\nlicense_name: mine\n---\n", "", "mine"),
            ("# Notes\nlicense: gpl\n", "", "not stated"),
            ("---\n: : :\n---\n", "", "not stated"),
            ("---\n- list\n---\n", "", "not stated"),
        )
    ):
        (folder / "README.md").unlink(missing_ok=True)
        if card is not None:
            (folder / "README.md").write_text(card)
        out = tmp_path / str(number)
        more = ("--licence", given) if given else ()
        main(["convert", "--from", "swin", "--source", str(folder), "--out", str(out), *more])
        assert read_note(out)["licence"] == licence, card
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    arguments = ("--source", folder, "--out", tmp_path / "out", "--licence", "gpl")
    assert "--licence 'gpl': the model card beside" in error_of("convert", "--from", "swin", *arguments)


def test_what_was_done_is_said_and_noted(theirs, tmp_path, capsys):
    state = {f"module.{name}": value for name, value in load_file(theirs).items()}
    state |= {"module.head.weight": np.zeros((3, 64), np.float32), "module.head.bias": np.zeros(3, np.float32)}
    save_file(state, tmp_path / "x.safetensors")
    main(["convert", "--from", "swin", "--source", str(tmp_path / "x.safetensors"), "--out", str(tmp_path / "out")])
    said, used = capsys.readouterr().out, len(state) - 2
    assert f"{used} of {len(state)} tensors used, 2 left out" in said
    assert "left out: 2, the classifier that the backbone was trained as (head.weight, head.bias)" in said or (
        "left out: 2, the classifier that the backbone was trained as (head.bias, head.weight)" in said
    )
    note = read_note(tmp_path / "out")
    assert note["tensors_used"] == used
    assert note["tensors_left_out"] == {"the classifier that the backbone was trained as": 2}
    assert note["notes"] == [f"{len(state)} names are read without the 'module.' before them"]


def damaged(folder: Path, name: str, text: str) -> Path:
    """A copy of a converted folder's outline with another note."""
    copy = folder / name
    (copy / "checkpoints" / "0").mkdir(parents=True)
    (copy / "weights.json").write_text(text)
    return copy


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "weights.json: is damaged"),
        ('{"kind": "swin"', "weights.json: is damaged"),
        ("[]", "its kind is None, none of opendet, swin, t5, clip"),
        ("{}", "its kind is None, none of"),
        ('{"kind": "resnet"}', "its kind is 'resnet', none of"),
        ('{"kind": ["swin"]}', "none of opendet"),
        ("[" * 100_000, "weights.json: is damaged"),
    ],
)
def test_a_damaged_note(tmp_path, text, message):
    folder = damaged(tmp_path, "copy", text)
    for command in (
        ("inspect", folder),
        ("export", folder, "--to", "swin", "--out", tmp_path / "x.safetensors"),
        ("embed-names", "--names", "n", "--encoder", folder, "--out", tmp_path / "t.npy"),
    ):
        assert message in error_of(*command), command
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy"]


def test_inspect_names_what_it_cannot_read(tmp_path):
    (tmp_path / "begun" / "checkpoints").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    assert "begun: holds checkpoints of this program, whole or begun" in error_of("inspect", tmp_path / "begun")
    assert "empty: holds no model.safetensors" in error_of("inspect", tmp_path / "empty")
    assert "absent: no such file or folder" in error_of("inspect", tmp_path / "absent")


def test_inspect_shows_no_terminal_codes(tmp_path, capsys):
    save_file({"a\x1b[31m.weight": np.zeros(2, np.float32)}, tmp_path / "x.safetensors")
    for more in ([], ["--all"]):
        main(["inspect", str(tmp_path / "x.safetensors"), *more])
        assert "\x1b" not in capsys.readouterr().out


def test_export_looks_at_its_output_first(ours, tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "load", never)
    (tmp_path / "there.pth").write_text("mine")
    (tmp_path / "folder.pth").mkdir()
    for out, message in (
        ("x.bin", "must end in .safetensors or .pth"),
        ("there.pth", "there.pth: is there already"),
        ("folder.pth", "folder.pth: is there already"),
        ("there.pth/x.pth", "cannot be written: "),
        (UNWRITABLE / "x.pth", "x.pth: cannot be written"),
    ):
        assert message in error_of("export", ours / "swin", "--to", "swin", "--out", tmp_path / out), out
    assert (tmp_path / "there.pth").read_text() == "mine"
    monkeypatch.setattr(commands, "find_spec", lambda name: None)
    assert "needs PyTorch" in error_of("export", ours / "swin", "--to", "swin", "--out", tmp_path / "x.pth")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.pth", "there.pth"]


def test_export_names_what_it_cannot_give(ours, tmp_path):
    for folder, layout, message in (
        (ours / "swin", "t5", "kind 'swin', not 't5'"),
        (ours / "swin", "opendet", "kind 'swin', not 'opendet'"),
        (ours / "clip", "swin_hugging_face", "kind 'clip', not 'swin'"),
        (ours / "nowhere", "swin", "nowhere: holds no converted weights (there is no such folder)"),
        (ours, "swin", "holds no converted weights"),
    ):
        assert message in error_of("export", folder, "--to", layout, "--out", tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


def test_embed_names_looks_at_its_output_first(ours, tmp_path, monkeypatch):
    monkeypatch.setattr(commands, "load_text_encoder", never)
    names = tmp_path / "names.json"
    names.write_text('["cat"]')
    (tmp_path / "there.npy").write_text("mine")
    for out, message in (
        ("x.txt", "must end in .npy"),
        ("there.npy", "there.npy: is there already"),
        ("names.npy", "names.json: is there already"),  # the list itself
        ("there.npy/x.npy", "cannot be written: "),
        (UNWRITABLE / "x.npy", "x.npy: cannot be written"),
    ):
        arguments = ("--names", names, "--encoder", ours / "clip", "--out", tmp_path / out)
        assert message in error_of("embed-names", *arguments), out
    assert names.read_text() == '["cat"]'
    assert sorted(path.name for path in tmp_path.iterdir()) == ["names.json", "there.npy"]


def test_embed_names_names_what_it_cannot_use(ours, tmp_path, monkeypatch, data_folder):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    names = tmp_path / "names.txt"
    names.write_text("cat\n")
    tokenizers = data_folder / "tokenizers"
    for listed, encoder, tokenizer, message in (
        (("--names", tmp_path / "no.txt"), "clip", "", "no.txt: cannot be read as names"),
        (("--names", tmp_path), "clip", "", "cannot be read as names"),
        (("--annotations", tmp_path / "no.json"), "clip", "", "no.json"),
        (("--annotations", names), "clip", "", "names.txt"),
        (("--names", names), "nowhere", "", "nowhere: holds no converted weights (there is no such folder)"),
        (("--names", names), "swin", "", "kind 'swin', not 'clip'"),
        (("--names", names), "clip", "", "clip: holds no tokenizer; give --tokenizer"),
        (("--names", names), "clip", tmp_path / "no", "cannot load the tokenizer"),
        (("--names", names), "clip", tokenizers / "t5", "is of another model: it ends a text with 1, not CLIP's"),
        (("--names", names, "--name_field", "x"), "clip", "", "--name_field: belongs to --annotations"),
    ):
        more = ("--tokenizer", tokenizer) if tokenizer else ()
        arguments = ("--encoder", ours / encoder, *more, "--out", tmp_path / "t.npy")
        assert message in error_of("embed-names", *listed, *arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["names.txt"]


def test_a_table_in_the_making_that_is_damaged_is_begun_again(ours, tmp_path, data_folder):
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    (tmp_path / "t.part.json").write_text('{"of": ')
    (tmp_path / "t.part.npy").write_text("torn")
    arguments = ["--names", tmp_path / "names.txt", "--encoder", ours / "clip", "--out", tmp_path / "t.npy"]
    arguments += ["--tokenizer", data_folder / "tokenizers" / "clip"]
    main(["embed-names", *map(str, arguments)])
    assert np.isfinite(np.load(tmp_path / "t.npy")).all()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["names.txt", "t.json", "t.npy"]


def test_a_table_begun_in_the_place_of_another_is_not_taken_for_it(tmp_path, monkeypatch):
    """Of one size, and stopped before its first rows: what is noted of the other is of rows that are gone."""

    class Encoder(embed_names.TextEncoder):
        width = 4

        def __init__(self, stops_at=0):
            self.calls, self.stops_at = 0, stops_at

        def __call__(self, texts):
            self.calls += 1
            if self.calls == self.stops_at:
                raise KeyboardInterrupt
            return np.ones((len(texts), 4), np.float32)

    monkeypatch.setattr(embed_names, "BATCH", 2)
    out, mine, others = tmp_path / "t.npy", ["a", "b", "c"], ["a", "b", "d"]
    for names, stops_at in ((mine, 2), (others, 1)):
        with pytest.raises(KeyboardInterrupt):
            embed_names.embed_names(names, Encoder(stops_at), out, "a test")
    embed_names.embed_names(mine, Encoder(), out, "a test")
    np.testing.assert_array_equal(np.load(out), np.ones((3, 4)))


def test_a_tokenizer_that_is_asked_for_is_kept(tmp_path, data_folder):
    """CLIP's file alone, and its tokenizer from elsewhere: the folder has both."""
    from opendet_jax.weights.text import CLIP_RULES

    rng = np.random.default_rng(0)
    clip = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), clip_text_shapes(CLIP))
    save_file(CLIP_RULES.to_theirs(clip), tmp_path / "clip.safetensors")
    (tmp_path / "config.json").write_text('{"num_attention_heads": 2}')
    convert = ("convert", "--from", "clip", "--source", tmp_path / "clip.safetensors", "--tokenizer")
    tokenizers = data_folder / "tokenizers"
    assert "is of another model" in error_of(*convert, tokenizers / "t5", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    main([*map(str, (*convert, tokenizers / "clip", "--out", tmp_path / "out"))])
    assert load_text_encoder(tmp_path / "out")(["a cat"]).shape == (1, 8)


def test_names_that_are_cut_are_said(ours, tmp_path, data_folder, capsys):
    long = "very " * 80 + "long"
    (tmp_path / "names.txt").write_text(f"cat\n{long}\n")
    arguments = ["--names", tmp_path / "names.txt", "--encoder", ours / "clip", "--out", tmp_path / "t.npy"]
    main(["embed-names", *map(str, arguments), "--tokenizer", str(data_folder / "tokenizers" / "clip")])
    assert "1 names are longer than CLIP reads, and cut: very very" in capsys.readouterr().out
    assert json.loads((tmp_path / "t.json").read_text()) == ["cat", long]


def test_a_folder_of_weights_appears_whole(ours, tmp_path, monkeypatch):
    """Cut off anywhere, nothing is taken for weights: until the checkpoint is in its place there are none."""
    swin = load(ours / "swin", "swin")
    moves = []

    def move(source, target):
        moves.append(Path(target).name)
        if len(moves) == 2:
            raise KeyboardInterrupt
        original(source, target)

    original = folders.os.replace
    monkeypatch.setattr(folders.os, "replace", move)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "out", swin, {})
    with pytest.raises(WeightsError, match="holds no converted weights"):
        load(tmp_path / "out", "swin")
    assert not (tmp_path / "out").exists()
