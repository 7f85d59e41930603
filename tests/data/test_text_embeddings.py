"""Embeddings of names: from a table, or hashed."""

import json
from dataclasses import replace

import numpy as np
import pytest

from opendet_jax.config import DataConfig
from opendet_jax.data.formats.json_source import read_json
from opendet_jax.data.scene_drawing import KINDS
from opendet_jax.data.text_embeddings import EmbeddingError, HashedEmbedder, TableEmbedder, make_embedder


@pytest.fixture
def table(tmp_path):
    rows = np.random.default_rng(0).normal(size=(3, 8))
    np.save(tmp_path / "table.npy", (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16))
    (tmp_path / "table.json").write_text(json.dumps(["Cat", "traffic light", "dog"]))
    return tmp_path / "table.npy"


def test_table_looks_names_up(table):
    rows = TableEmbedder(table).embed(["dog", " Traffic Light ", "cat", "dog"])
    np.testing.assert_allclose(rows, np.load(table).astype(np.float32)[[2, 1, 0, 2]], atol=1e-3)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-6)
    assert TableEmbedder(table).embed([]).shape == (0, 8)


def test_missing_names_are_all_listed(table):
    with pytest.raises(EmbeddingError, match=r"table\.npy: has no embedding of 2 names: 'cow', 'owl'"):
        TableEmbedder(table).embed(["owl", "cat", "cow", "owl"])


def test_tables_of_another_form(table, tmp_path):
    (tmp_path / "table.json").write_text('["one"]')
    with pytest.raises(EmbeddingError, match=r"shape \(3, 8\) does not match the 1 names"):
        TableEmbedder(table)
    (tmp_path / "table.json").unlink()
    with pytest.raises(EmbeddingError, match=r"table\.json: no such file"):
        TableEmbedder(table)


def test_width_must_be_the_models(table):
    config = DataConfig(text_embeddings="table", text_table=str(table))
    assert make_embedder(config, 8).width == 8
    with pytest.raises(EmbeddingError, match=r"8 wide, model\.text_width is 16"):
        make_embedder(config, 16)
    assert make_embedder(replace(config, text_embeddings="hashed"), 16).width == 16


def test_hashed_embeddings_are_fixed_unit_rows_and_distinct():
    names = [kind.name for kind in KINDS]
    rows = HashedEmbedder(128).embed(names)
    assert rows.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-6)
    np.testing.assert_array_equal(rows[5:6], HashedEmbedder(128).embed([f" {names[5].upper()}"]))
    assert (rows @ rows.T - np.eye(len(rows))).max() < 0.95  # no two names count as the same (threshold 0.99)
    assert HashedEmbedder(16).embed([]).shape == (0, 16)


def test_hashed_embeddings_are_near_where_letters_are_shared():
    near, base, far = HashedEmbedder(512).embed(["red star", "red ring", "scarlet hoop"])
    assert base @ near > 0.4 > 0.25 > base @ far


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_clip_table_has_every_name_of_minilvis(data_folder, split):
    dataset, _ = read_json(data_folder / f"minilvis/{split}.json", data_folder / "minilvis/images")
    rows = TableEmbedder(data_folder / "names/clip_vitb32_union_names.npy").embed(dataset.names())
    assert rows.shape == (len(dataset.names()), 512)


def test_rows_stay_in_the_file_until_they_are_asked_for(table):
    rows = TableEmbedder(table).rows(["dog", "cat", "Traffic light"])
    assert isinstance(rows.table, np.memmap)
    wanted = TableEmbedder(table).embed(["traffic light", "dog", "dog"])
    np.testing.assert_array_equal(rows[np.array([2, 0, 0])], wanted)
    assert rows[np.array([], np.int64)].shape == (0, 8)
    with pytest.raises(EmbeddingError, match="no embedding of 1 names: 'cow'"):
        TableEmbedder(table).rows(["cat", "cow"])


def test_a_name_with_underscores_has_the_row_of_its_words(table):
    """Categories have spaces, fields of annotations may have underscores. A row of the very name goes before."""
    rows = TableEmbedder(table).embed(["traffic_light", "Traffic_Light", "traffic light"])
    np.testing.assert_array_equal(rows, TableEmbedder(table).embed(["traffic light"] * 3))
    (table.with_suffix(".json")).write_text(json.dumps(["traffic light", "traffic_light", "dog"]))
    embedder = TableEmbedder(table)
    assert not np.allclose(*embedder.embed(["traffic light", "traffic_light"]))


@pytest.mark.parametrize("text", ["", "[", '{"cat": 1}', '["cat", 3, "dog"]', "[" * 100_000])
def test_a_damaged_list_beside_the_table(table, text):
    table.with_suffix(".json").write_text(text)
    with pytest.raises(EmbeddingError, match=r"table\.json: (cannot be read as|is not) a list of names"):
        TableEmbedder(table)


def test_rows_that_no_unit_row_can_be_made_of(table):
    """Word vectors have zeros for words that they do not know."""
    rows = np.load(table)
    rows[1], rows[2, 3] = 0, np.nan
    np.save(table, rows)
    embedder = TableEmbedder(table)
    assert np.isfinite(embedder.embed(["cat"])).all()
    with pytest.raises(EmbeddingError, match=r"zero or not finite, of 2 names: 'traffic light', 'dog'$"):
        embedder.rows(["cat", "traffic light", "dog"])


def test_a_table_of_text(table):
    np.save(table, np.array([["a", "b"]] * 3))
    with pytest.raises(EmbeddingError, match=r"table\.npy: is a table of <U1, not of floating-point numbers"):
        TableEmbedder(table)
