"""Names to tokens and back, with the tokenizer that needs no file and with T5's."""

import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers import ByT5Tokenizer

from opendet_jax.config import DataConfig
from opendet_jax.data import tokenizer as module
from opendet_jax.data.formats.records import Record
from opendet_jax.data.tokenizer import (
    TokenizerError,
    check_names,
    encode_names,
    load_tokenizer,
    lost_names,
    warn_of_long_names,
)
from tests.data.names import decode_names


@pytest.fixture(scope="module")
def byt5():
    return load_tokenizer("byt5", 384)


@pytest.fixture(scope="module")
def t5(data_folder):
    return load_tokenizer(str(data_folder / "tokenizers" / "t5"), 32128)


def test_byt5_tokens_are_bytes(byt5):
    tokens = encode_names(byt5, ["cat", "ox"], 6)
    assert tokens.dtype == np.int32
    np.testing.assert_array_equal(tokens, [[102, 100, 119, 1, 0, 0], [114, 123, 1, 0, 0, 0]])


def test_t5_tokens(t5):
    np.testing.assert_array_equal(encode_names(t5, ["fire hydrant"], 7), [[1472, 3, 10656, 288, 1, 0, 0]])


@pytest.mark.parametrize("name", ["byt5", "t5"])
def test_round_trip(name, request):
    tokenizer = request.getfixturevalue(name)
    names = ["cat", "fire hydrant", "bus (vehicle)", "T-shirt, red"]
    tokens = encode_names(tokenizer, names, 32)
    assert decode_names(tokenizer, tokens) == names
    # As the language model generates them: 0 in front.
    assert decode_names(tokenizer, np.pad(tokens, ((0, 0), (1, 0)))) == names


def test_bytes_write_any_name(byt5):
    assert decode_names(byt5, encode_names(byt5, ["jalapeño", "猫"], 32)) == ["jalapeño", "猫"]


@pytest.mark.parametrize("name", ["byt5", "t5"])
def test_a_cut_name_still_ends(name, request):
    tokenizer = request.getfixturevalue(name)
    tokens = encode_names(tokenizer, ["a very long name of a thing " * 4], 5)
    assert (tokens[0, :4] > 1).all()
    assert tokens[0, 4] == 1


@pytest.mark.parametrize("name", ["byt5", "t5"])
def test_any_tokens_decode(name, request):
    """A model may know more tokens than the tokenizer, or cut a letter of several bytes."""
    tokenizer = request.getfixturevalue(name)
    assert decode_names(tokenizer, np.array([[0, 32127, 1, 0], [0, 0, 0, 0]])) == ["", ""]
    assert isinstance(decode_names(tokenizer, np.array([[0, 198, 1, 0]]))[0], str)


@pytest.mark.parametrize("name", ["", "  ", "\n"])
def test_empty_name(byt5, name):
    with pytest.raises(TokenizerError, match="must not be empty"):
        encode_names(byt5, ["cat", name], 8)


def test_no_names(byt5):
    assert encode_names(byt5, [], 8).shape == (0, 8)
    assert decode_names(byt5, np.zeros((0, 8), np.int32)) == []


def test_missing_tokenizer_names_the_field(tmp_path):
    with pytest.raises(TokenizerError, match=r"data\.tokenizer: cannot load .*nowhere"):
        load_tokenizer(str(tmp_path / "nowhere"), 384)


def test_code_that_comes_with_a_tokenizer_is_not_run(tmp_path, monkeypatch):
    """Nor is anybody asked at the terminal whether it may be, as transformers does unless it is told."""
    monkeypatch.setattr("builtins.input", lambda _: "y")
    described = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(described))
    code = f"from transformers import PreTrainedTokenizer\nopen({str(tmp_path / 'ran')!r}, 'w').close()\n"
    (tmp_path / "mine.py").write_text(code + "class Mine(PreTrainedTokenizer): pass\n")
    with pytest.raises(TokenizerError, match=r"data\.tokenizer: cannot load"):
        load_tokenizer(str(tmp_path), 384)
    assert not (tmp_path / "ran").exists()


def test_t5s_file_is_read_as_transformers_reads_it(t5, data_folder):
    """In which it takes seconds longer, and PyTorch along where that is installed."""
    assert isinstance(t5, module.T5Tokenizer)
    theirs = module._pretrained(str(data_folder / "tokenizers" / "t5"), download=False)
    assert t5.size == theirs.size
    categories = json.loads((data_folder / "names/lvis_v1_categories.json").read_text())
    rng = np.random.default_rng(0)
    letters = list("abc XYZ,.'-()é½猫ﬁ\u200b\u00a0!?&/0123")
    drawn = ["".join(rng.choice(letters, size)) for size in rng.integers(1, 15, 1000)]
    marks = [
        "salt , pepper",
        "do n't",
        "he 's , we 've , they 're , I 'm .",
        "a ' b ' c",
        "what ? that !",
        "</s> <extra_id_3>",
    ]
    for name in [*(category["name"] for category in categories), *drawn, *marks]:
        tokens = theirs.encode(name)
        assert t5.encode(name) == tokens, name
        assert t5.decode(tokens) == theirs.decode(tokens), name
    for tokens in rng.integers(0, 32128, (1000, 6)):
        assert t5.decode(tokens) == theirs.decode(tokens), tokens


@pytest.mark.parametrize("change", [{"eos_token": "<unk>"}, {"tokenizer_class": "LlamaTokenizer"}, {"pad_token": None}])
def test_what_is_no_t5s_is_left_to_transformers(data_folder, tmp_path, change):
    shutil.copytree(data_folder / "tokenizers" / "t5", tmp_path / "t5")
    assert module._t5(tmp_path / "t5") is not None
    path = tmp_path / "t5" / "tokenizer_config.json"
    path.chmod(0o644)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert module._t5(tmp_path / "t5") is None


def test_other_models_tokenizer_is_refused(data_folder):
    with pytest.raises(TokenizerError, match=r"data\.tokenizer: .* is not a T5 tokenizer"):
        load_tokenizer(str(data_folder / "tokenizers" / "clip"), 60000)


def test_more_tokens_than_the_language_model_knows():
    with pytest.raises(TokenizerError, match=r"'byt5' has 384 tokens, config\.model\.t5\.vocab_size is 383"):
        load_tokenizer("byt5", 383)


def records(*boxes: str | tuple[str, ...]) -> list[Record]:
    """A picture whose boxes have these names."""
    names = tuple((name,) if isinstance(name, str) else name for name in boxes)
    sides = np.tile(np.array([0, 0, 1, 1], np.float32), (len(names), 1))
    return [Record(1, Path("a.jpg"), 9, 9, sides, names, np.ones(len(names), np.int64))]


SAME = ["cat", "bus (vehicle)", "café", "T-shirt, red", "a_b", "don't", " two  spaces ", "tab\tand\u00a0space"]


@pytest.mark.parametrize("name", ["byt5", "t5"])
def test_names_that_come_back(name, request):
    assert lost_names(records(*SAME), request.getfixturevalue(name), 32).names == ()


@pytest.mark.parametrize(
    ("name", "spelt"),
    [
        ("jalapeño", "jalapeo"),
        ("ñ", ""),
        ("猫", ""),
        ("螺丝", ""),
        ("½ inch bolt", "12 inch bolt"),
        ("ﬁsh", "fish"),
        ("more…", "more..."),
        ("cafe\u0301", "café"),
        ("smile 🙂 face", "smile  face"),
        ("a^b", "ab"),
        ("</s>", ""),
        ("<extra_id_0> hat", "hat"),
        ("salt , pepper", "salt, pepper"),
    ],
)
def test_names_that_t5_cannot_write(t5, name, spelt):
    [lost] = lost_names(records("cat", name), t5, 32).names
    assert (lost.name, lost.spelt, lost.cut, lost.boxes) == (name, spelt, False, 1)


def test_bytes_write_all_of_them(byt5):
    names = ("jalapeño", "猫", "½ inch", "ﬁsh", "more…", "a^b", "🙂", "a </s> b", "<pad>", "cafe\u0301")
    assert not lost_names(records(*names), byt5, 32).names


def test_names_that_are_cut_off(byt5):
    screws = ("hexagon socket head cap screw M8 x 20", "hexagon socket head cap screw M8 x 30")
    found = lost_names(records(*screws, "cat"), byt5, 32)
    assert [(lost.name, lost.tokens, lost.cut) for lost in found.names] == [(screw, 38, True) for screw in screws]
    assert {lost.spelt for lost in found.names} == {"hexagon socket head cap screw M"}
    assert not lost_names(records(*screws), byt5, 38).names
    assert lost_names(records("猫" * 11), byt5, 33).names[0].spelt == "猫" * 10, "not half a letter"


@pytest.mark.parametrize(
    ("tokenizer", "most", "cut"), [("byt5", 32, 2), ("byt5", 24, 19), ("t5", 8, 20), ("t5", 32, 0)]
)
def test_names_of_lvis(tokenizer, most, cut, request, data_folder):
    names = [
        c["name"].replace("_", " ") for c in json.loads((data_folder / "names/lvis_v1_categories.json").read_text())
    ]
    found = lost_names(records(*names), request.getfixturevalue(tokenizer), most)
    assert len(found.names) == cut
    assert all(lost.cut for lost in found.names)
    assert found.all_names == 1203


T5 = DataConfig(tokenizer="t5")


def test_few_boxes_are_a_warning(t5, caplog):
    check_names(records(*["cat"] * 299, "猫"), t5, T5, "mine.json")
    [line, lost, advice] = caplog.messages[-1].split("\n")
    assert line.startswith(
        "mine.json: 1 of 2 names, of 1 of 300 boxes (0.33%), cannot be learnt: with data.tokenizer = 't5'"
    )
    assert (lost, advice) == ("  '猫' becomes ''", "data.tokenizer = 'byt5' can write every letter (docs/data.md)")


def test_many_are_an_error(t5):
    """By boxes, not by names: one name of two boxes in a hundred."""
    many = records(*["cat"] * 98, "猫", "猫")
    with pytest.raises(
        TokenizerError, match=r"1 of 2 names, of 2 of 100 boxes .*\n.*\n.*\ndata\.max_unwritable = 0\.01"
    ):
        check_names(many, t5, T5, "mine.json")
    check_names(many, t5, replace(T5, max_unwritable=0.02), "mine.json")
    with pytest.raises(TokenizerError, match=r"data\.max_unwritable = 0 allows"):
        check_names(records(*["cat"] * 1000, "猫"), t5, replace(T5, max_unwritable=0.0), "mine.json")


def test_one_of_several_names_concerns_the_box_once(t5):
    found = lost_names(records(("cat", "猫", "貓"), "cat", ("dog", "cat")), t5, 32)
    assert (len(found.names), found.all_names, found.boxes, found.all_boxes) == (2, 4, 1, 3)


def test_the_first_ten_are_listed_those_of_most_boxes_first(t5, caplog):
    names = list("一二三四五六七八九十百千")
    check_names(records(*names, *["千"] * 5), t5, replace(T5, max_unwritable=1.0), "mine.json")
    lines = caplog.messages[-1].split("\n")
    assert len([line for line in lines if "becomes" in line]) == 10
    assert lines[1] == "  '千' becomes ''"
    assert "  … and 2 more" in lines


def test_what_to_do_about_names_that_are_cut_off(byt5):
    with pytest.raises(TokenizerError, match=r"'a long name' is cut off to 'a l', it has 12 tokens") as error:
        check_names(records("a long name"), byt5, DataConfig(tokenizer="byt5", max_name_tokens=4), "mine.json")
    assert "data.max_name_tokens = 12 has room" in str(error.value)
    assert "can write every letter" not in str(error.value)


def test_names_longer_than_evaluation_generates(byt5, caplog):
    warn_of_long_names(records("cat", "garden gnome"), byt5, 11, "mine.json")
    assert "1 names have more than eval.max_new_tokens = 11 tokens and cannot be found; 13 has room" in caplog.text
    assert "for them: 'garden gnome'" in caplog.text
    caplog.clear()
    warn_of_long_names(records("cat", "garden gnome"), byt5, 12, "mine.json")
    assert not caplog.messages


def test_each_name_is_tried_once(t5, monkeypatch):
    """A million boxes of a few names take no longer than counting them."""
    [record] = records("cat", "dog")
    boxes = tuple(record.names[i % 2] for i in range(1000))
    many = [replace(record, names=boxes)] * 1000
    decoded = []
    decode = type(t5).decode
    monkeypatch.setattr(type(t5), "decode", lambda self, tokens: decoded.append(tokens) or decode(self, tokens))
    began = time.process_time()
    assert lost_names(many, t5, 32).all_boxes == 1_000_000
    assert len(decoded) == 2
    assert time.process_time() - began < 10


def test_bytes_are_those_of_transformers():
    theirs = ByT5Tokenizer()
    ours = load_tokenizer("byt5", 384)
    assert ours.size == len(theirs)
    for name in ("a", "bus (vehicle)", "jalapeño", "猫", "½ ﬁ…", " spaced  out ", "\x00\x7f", "🚲"):
        tokens = theirs(name, add_special_tokens=False)["input_ids"]
        assert ours.encode(name) == tokens
        for cut in range(len(tokens) + 1):  # in the middle of letters, too
            row = [0, *tokens[:cut], 1, 0, 2, 259, 383, 400]
            known = [token for token in row if token < len(theirs)]
            assert ours.decode(row) == theirs.decode(known, skip_special_tokens=True).strip()


def test_what_spells_byte_by_byte_starts_without_transformers():
    """They bring PyTorch, wherever it is installed: seconds of every start."""
    program = (
        "import sys; import opendet_jax.main, opendet_jax.train.training_loop, opendet_jax.evaluate.loop, "
        "opendet_jax.predict.detector; from opendet_jax.data.tokenizer import load_tokenizer; "
        "load_tokenizer('byt5', 384); print({'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_a_file_saved_while_it_pads_and_cuts(t5, data_folder, tmp_path):
    """As transformers leaves it after a call with padding="max_length" and truncation=True."""
    folder = shutil.copytree(data_folder / "tokenizers" / "t5", tmp_path / "t5")
    inner = Tokenizer.from_file(str(folder / "tokenizer.json"))
    inner.enable_padding(length=8)
    inner.enable_truncation(8)
    inner.save(str(folder / "tokenizer.json"))
    saved = module.load_tokenizer(str(folder), t5.size)
    for name in ("red ring", "a very long and unusual name of an object that nobody ever draws"):
        assert saved.encode(name) == t5.encode(name)
