"""Lists of names: what is wrong in one is said before anything is compiled; and how images wait for their batch."""

import json
import logging
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from opendet_jax.config import Config, DataConfig, ModelConfig
from opendet_jax.data.text_embeddings import EmbeddingError, HashedEmbedder
from opendet_jax.errors import InputError
from opendet_jax.given_names import given_names, written_names
from opendet_jax.predict.detector import READ_AHEAD, _Fitted, in_batches

DATA = DataConfig(text_embeddings="hashed", tokenizer="byt5")
MODEL = ModelConfig(text_width=8)
CONFIG = Config(data=DATA, model=replace(MODEL, t5=replace(MODEL.t5, vocab_size=384)))


def test_by_alignment_names_have_rows_up_to_a_power_of_two():
    given = given_names([" cat", "dog ", "cat", "traffic light"], "alignment", CONFIG)
    assert given.names == ("cat", "dog", "traffic light")
    assert given.texts.shape == (4, 8)
    np.testing.assert_array_equal(given.texts[:3], HashedEmbedder(8).embed(given.names))
    assert not given.texts[3].any()
    assert given_names(["cat"], "alignment", CONFIG).texts.shape == (1, 8)


def test_by_language_names_come_back_as_they_were_written():
    given = given_names(["Cat", "cat", "café"], "language", CONFIG)
    assert given.most_tokens == 16
    assert given_names(["c" * 16], "language", CONFIG).most_tokens == 32
    for name in given.names:
        row = np.zeros(1 + given.most_tokens, np.int32)
        row[1 : 2 + len(name.encode())] = [*(byte + 3 for byte in name.encode()), 1]
        assert given.decode(row) == name
    assert given.decode(np.zeros(17, np.int32)) == ""


@pytest.mark.parametrize("by", ["alignment", "language"])
@pytest.mark.parametrize(
    ("names", "message"), [([], "names is empty"), (["cat", " "], "names has an empty name"), ([""], "empty name")]
)
def test_nothing_to_choose_from(names, by, message):
    with pytest.raises(InputError, match=message):
        given_names(names, by, CONFIG)


def test_other_things_are_no_list_of_names():
    """In a process of its own, without the type checks of the tests, which would be first to complain."""
    code = """
from opendet_jax.config import Config
from opendet_jax.given_names import given_names, written_names
for names, by in (("cat", "language"), (["cat", 1], "language"), (["cat"], "magic")):
    try:
        given_names(names, by, Config())
    except (TypeError, ValueError) as error:
        print(type(error).__name__, error)
"""
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout.splitlines() == [
        "TypeError names is a list of names, not 'cat'",
        "TypeError names is a list of names, not ['cat', 1]",
        "InputError by is 'language' or 'alignment', not 'magic'",
    ]


def test_a_name_without_embedding(tmp_path):
    np.save(tmp_path / "table.npy", np.eye(8, dtype=np.float32)[:1])
    (tmp_path / "table.json").write_text(json.dumps(["cat"]))
    data = replace(DATA, text_embeddings="table", text_table=str(tmp_path / "table.npy"))
    config = replace(CONFIG, data=data)
    assert given_names(["Cat"], "alignment", config).names == ("Cat",)
    with pytest.raises(EmbeddingError, match=r"has no embedding of 1 names: 'dog'"):
        given_names(["cat", "dog"], "alignment", config)


def test_names_that_the_language_model_cannot_tell_apart(monkeypatch, caplog):
    class Shouting:
        size = 384

        def encode(self, name):
            return [ord(letter) for letter in name.upper() if letter != "½"]

        def decode(self, tokens):
            return "".join(map(chr, tokens))

    monkeypatch.setattr("opendet_jax.given_names.load_tokenizer", lambda *_: Shouting())
    with pytest.raises(InputError, match="names: 'cat' and 'Cat' are the same in the tokens of 'byt5'"):
        given_names(["cat", "dog", "Cat"], "language", CONFIG)
    with pytest.raises(InputError, match="names: '½' cannot be written in the tokens of 'byt5'"):
        given_names(["½"], "language", CONFIG)
    with caplog.at_level(logging.WARNING):
        given_names(["CAT", "dog"], "language", CONFIG)
    assert "1 of the given names are looked for as the model can write them: 'dog' as 'DOG'" in caplog.text


def test_names_in_a_text():
    assert written_names(" cat, traffic light\ndog,,") == ["cat", "traffic light", "dog"]
    assert written_names("") is written_names(" ,\n") is None


def fitted(bucket):
    return _Fitted((bucket, bucket), np.zeros((bucket, bucket, 3), np.uint8), np.ones((bucket, bucket), bool), (1, 1))


def batches(buckets, size):
    return [list(batch) for batch in in_batches(map(fitted, buckets), size)]


def test_images_of_one_bucket_go_together():
    assert batches([1, 2, 1, 2, 2, 1, 1], 2) == [[0, 2], [1, 3], [5, 6], [4]]
    assert batches([1, 2, 1], 1) == [[0], [1], [2]]
    assert batches([], 3) == []


def test_no_image_waits_for_ever():
    """One of a rare size is detected when READ_AHEAD batches of images have come."""
    size = 4
    taken = []

    def images():
        for number, bucket in enumerate([1, *[2] * 40]):
            taken.append(number)
            yield fitted(bucket)

    waited = next(len(taken) for batch in in_batches(images(), size) if 0 in batch)
    assert waited == READ_AHEAD * size
    assert sorted(number for batch in batches([1, *[2] * 40], size) for number in batch) == list(range(41))
