"""The memory of texts, and CLIP's text tower behind it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opendet_jax.checkpoints.folder import Converted, save
from opendet_jax.config import CLIPTextConfig
from opendet_jax.errors import WeightsError
from opendet_jax.evaluate.name_mapping import TextEncoderMapping
from opendet_jax.evaluate.name_similarity import RememberingEncoder, load_encoder
from opendet_jax.model.clip_text import CLIPText

E = 8


class Counting:
    """The row of a text is its length, and its calls are noted."""

    def __init__(self):
        self.asked = []

    def __call__(self, texts):
        assert texts
        self.asked.append(list(texts))
        return np.array([[len(text), 1] for text in texts], np.float32)


def test_every_text_is_encoded_once():
    inner = Counting()
    encode = RememberingEncoder(inner, width=2, capacity=10)
    np.testing.assert_array_equal(encode(["aa", "b", "aa"]), [[2, 1], [1, 1], [2, 1]])
    np.testing.assert_array_equal(encode(["b", "ccc", "aa"]), [[1, 1], [3, 1], [2, 1]])
    assert encode(["b"]).dtype == np.float32
    assert encode([]).shape == (0, 2)
    assert inner.asked == [["aa", "b"], ["ccc"]]


def test_the_longest_unused_are_forgotten():
    inner = Counting()
    encode = RememberingEncoder(inner, width=2, capacity=2)
    encode(["a", "bb"])
    encode(["a"])
    encode(["ccc"])  # bb goes
    encode(["a", "ccc"])
    assert inner.asked == [["a", "bb"], ["ccc"]]
    encode(["bb"])
    assert inner.asked[2:] == [["bb"]]
    many = ["d" * n for n in range(1, 7)]
    np.testing.assert_array_equal(encode(many)[:, 0], range(1, 7))  # more than it remembers
    assert len(encode._rows) == 2


def test_a_remembered_row_holds_no_batch():
    encode = RememberingEncoder(Counting(), width=2, capacity=10)
    encode(["a", "bb", "ccc"])
    assert all(row.base is None for row in encode._rows.values())


@pytest.fixture(scope="module")
def folder(tmp_path_factory, data_folder):
    """A small CLIP text tower as `python -m opendet_jax.weights convert --from clip` leaves it."""
    folder = tmp_path_factory.mktemp("clip")
    config = CLIPTextConfig(width=16, num_layers=1, num_heads=2, ffn_width=32, text_width=E)
    params = CLIPText(config).init(jax.random.key(0), jnp.ones((1, 8), int))["params"]
    save(folder, Converted("clip", vars(config), params), {"source": "a test"})
    (folder / "tokenizer").mkdir()
    for path in (data_folder / "tokenizers" / "clip").iterdir():
        (folder / "tokenizer" / path.name).write_bytes(path.read_bytes())
    return folder


def test_names_to_classes_by_clip(folder):
    encode = load_encoder(str(folder))
    assert encode.width == E
    names = ["cat", "bus (vehicle)", "teddy bear"]
    categories = [{"id": 10 + i, "name": name} for i, name in enumerate(names)]
    mapping = TextEncoderMapping(categories, encode)
    classes = mapping([[name] for name in reversed(names)], np.ones(3, np.float32))
    np.testing.assert_array_equal(classes.ids[:, 0], [12, 11, 10])
    np.testing.assert_allclose(classes.scores[:, 0], 1, atol=1e-6)
    rows = encode([f"a {name}" for name in names])
    np.testing.assert_allclose(classes.scores[2], np.sort(np.clip(rows @ rows[0], 0, 1))[::-1] ** 0.5, atol=1e-6)
    beams = mapping([["cat", "teddy bear", "x" * 200]], np.ones(1, np.float32))
    joined = encode(["a " + ("cat, teddy bear, " + "x" * 200)[:75]])[0]
    np.testing.assert_allclose(np.sort(beams.scores[0]), np.sort(np.clip(rows @ joined, 0, 1)) ** 0.5, atol=1e-6)


def test_what_is_missing_is_named(folder, tmp_path):
    with pytest.raises(WeightsError, match=r"eval\.text_encoder: .*nowhere: holds no converted weights"):
        load_encoder(str(tmp_path / "nowhere"))
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "checkpoints").symlink_to(folder / "checkpoints")
    (bare / "weights.json").symlink_to(folder / "weights.json")
    with pytest.raises(WeightsError, match=r"eval\.text_encoder: .*bare: holds no tokenizer"):
        load_encoder(str(bare))
