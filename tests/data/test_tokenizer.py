"""Names to tokens and back, with the tokenizer that needs no file and with T5's."""

import numpy as np
import pytest

from opendet_jax.data.tokenizer import TokenizerError, encode_names, load_tokenizer
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


def test_other_models_tokenizer_is_refused(data_folder):
    with pytest.raises(TokenizerError, match=r"data\.tokenizer: .* is not a T5 tokenizer"):
        load_tokenizer(str(data_folder / "tokenizers" / "clip"), 60000)


def test_more_tokens_than_the_language_model_knows():
    with pytest.raises(TokenizerError, match=r"'byt5' has 384 tokens, config\.model\.t5\.vocab_size is 383"):
        load_tokenizer("byt5", 383)
