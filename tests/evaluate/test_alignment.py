"""The analysis of alignment with a model whose outputs are its parameters: pairs, means, missing names, fillers."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from PIL import Image

from opendet_jax.config import Config, DataConfig, EvalConfig, ModelConfig
from opendet_jax.data.formats.json_source import read_json
from opendet_jax.data.formats.records import Dataset
from opendet_jax.data.text_embeddings import EmbeddingError, HashedEmbedder
from opendet_jax.evaluate.alignment import Alignment, analyse
from opendet_jax.evaluate.loop import evaluate
from opendet_jax.evaluate.name_similarity import EmbeddedNames, EncodedNames, RememberingEncoder, name_texts
from opendet_jax.evaluate.pictures import draw_alignment
from opendet_jax.inference import Inference
from opendet_jax.model.opendet import Agreement
from opendet_jax.ops.boxes import to_centres
from tests.stand_ins import encoded

E = 16
CONFIG = Config(
    model=ModelConfig(text_width=E),
    data=DataConfig(name="toy", eval_short_side=32, max_long_side=64, buckets=((32, 64),), text_embeddings="hashed"),
    eval=EvalConfig(batch_size=2, num_beams=2, max_new_tokens=3),
)
BOXES = np.array([[4, 4, 12, 12], [20, 8, 30, 28], [40, 2, 60, 20], [0, 0, 64, 32]], np.float32)  # of the queries
SAID = ["cat", "dog", "red bus", "never"]  # what each query is named; the last is not valid
WORLD = {  # image → (box of which query, true name)
    10: [(1, "dog"), (0, "black cat")],
    11: [(2, "bus")],
    12: [],
    13: [(0, "cat"), (1, "cat"), (2, "cat"), (2, "cat")],  # more objects than valid queries
    14: [(2, "red bus")],
}


def detected(batch: int) -> SimpleNamespace:
    """The same queries in every image; the prompt of a query is its number."""

    def of_each(x):
        return jnp.broadcast_to(x, (batch, *x.shape))

    boxes = to_centres(jnp.asarray(BOXES) / jnp.array([64.0, 32.0, 64.0, 32.0]))
    decoded = SimpleNamespace(boxes=of_each(boxes)[None], objectness=jnp.zeros((1, batch, 4)))
    valid = of_each(jnp.array([True, True, True, False]))
    prompts = of_each(jnp.tile(jnp.arange(4.0)[:, None], (1, E)))
    return SimpleNamespace(decoded=decoded, queries=SimpleNamespace(valid=valid), prompts=prompts)


class Scripted(nn.Module):
    """S is three times the cosine."""

    def encode(self, images, deterministic):
        found = detected(len(images.pixels))
        return encoded(found.decoded.boxes[-1], found.decoded.objectness[-1], found.queries.valid)

    def decode(self, features, memory, queries):
        return detected(len(queries.valid))

    @nn.compact
    def detect_and_align(self, images, texts):
        hidden = self.variable("params", "hidden", lambda: None).value
        cosine = jnp.einsum("qe,bge->bqg", hidden, texts)
        return detected(len(texts)), Agreement(cosine=cosine, logits=3 * cosine)

    def generate(self, prompts, num_beams, max_new_tokens, trie):
        tokens = jnp.broadcast_to(prompts[:, None, :1].astype(jnp.int32), (len(prompts), num_beams, 4))
        return SimpleNamespace(tokens=tokens, scores=jnp.zeros((len(prompts), num_beams)))


def write_world(folder: Path) -> Dataset:
    images, annotations = [], []
    names = sorted({name for objects in WORLD.values() for _, name in objects})
    for image_id, objects in WORLD.items():
        Image.new("RGB", (64, 32)).save(folder / f"{image_id}.png")
        images.append({"id": image_id, "file_name": f"{image_id}.png", "width": 64, "height": 32})
        for query, name in objects:
            x0, y0, x1, y1 = BOXES[query].tolist()
            entry = {"id": len(annotations), "image_id": image_id, "category_id": names.index(name)}
            annotations.append({**entry, "bbox": [x0, y0, x1 - x0, y1 - y0]})
    categories = [{"id": i, "name": name} for i, name in enumerate(names)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "toy.json").write_text(json.dumps(content))
    return read_json(folder / "toy.json", folder)[0]


def scripted(mesh: Mesh | None = None) -> Inference:
    hidden = HashedEmbedder(E).embed(["dog", "horse", "car", "cat"])
    return Inference(Scripted(), {"hidden": hidden}, CONFIG, lambda tokens: SAID[int(tokens[0])], mesh)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def inference():
    return scripted()


def test_every_object_is_matched_once(dataset, inference):
    texts = EmbeddedNames(HashedEmbedder(E), "hashed")
    found = analyse(inference, dataset, CONFIG, texts)
    embed = HashedEmbedder(E).embed
    pairs = [(1, "dog"), (0, "black cat"), (2, "bus"), *[(q, "cat") for q in (0, 1, 2)], (2, "red bus")]
    queries, names = [query for query, _ in pairs], [name for _, name in pairs]
    cosine = (np.asarray(inference.params["hidden"])[queries] * embed(names)).sum(axis=1)
    np.testing.assert_allclose(found.cosine, cosine, atol=1e-6)
    np.testing.assert_allclose(found.score, 1 / (1 + np.exp(-3 * cosine)), atol=1e-6)
    similarity = (embed([SAID[query] for query in queries]) * embed(names)).sum(axis=1)
    np.testing.assert_allclose(found.similarity, similarity, atol=1e-6)
    assert found.similarity[0] == found.similarity[-1] == pytest.approx(1)
    assert (found.objects, found.embeddings) == (8, "hashed")
    summary = found.summary()
    assert summary["query_text_cosine"] == {
        "mean": pytest.approx(cosine.mean()),
        "std": pytest.approx(cosine.std()),
        "count": 7,
    }
    assert f"query–text alignment {cosine.mean():.3f} ± {cosine.std():.3f} of 7" in str(found)
    json.dumps(summary, allow_nan=False)


def test_the_size_of_a_batch_does_not_matter(dataset, inference):
    """Images 12 (no object) and the fillers stand at other places then."""
    texts = EmbeddedNames(HashedEmbedder(E), "hashed")
    want = analyse(inference, dataset, CONFIG, texts)
    for size in (1, 4):
        config = replace(CONFIG, eval=replace(CONFIG.eval, batch_size=size))
        found = analyse(inference, dataset, config, texts)
        for name in ("cosine", "score", "similarity"):
            np.testing.assert_allclose(getattr(found, name), getattr(want, name), atol=1e-6)


@pytest.fixture
def table(tmp_path):
    """Of "red bus" it has no row as long as nobody adds one."""
    names = ["cat", "dog", "black cat", "bus"]

    def write(*more):
        known = [*names, *more]
        np.save(tmp_path / "table.npy", HashedEmbedder(E).embed(known))
        (tmp_path / "table.json").write_text(json.dumps(known))
        data = replace(CONFIG.data, text_embeddings="table", text_table=str(tmp_path / "table.npy"))
        return replace(CONFIG, data=data)

    return write


def test_a_table_that_lacks_generated_names(dataset, inference, table):
    dataset = replace(dataset, records=dataset.records[:4])  # whose true names it has
    config = table()
    found = analyse(inference, dataset, config, name_texts(dataset, config, None))
    np.testing.assert_array_equal(np.isnan(found.similarity), [False, False, True, False, False, True])
    summary = found.summary()
    assert (summary["embeddings"], summary["name_similarity"]["count"]) == ("table", 4)
    assert summary["query_text_cosine"]["count"] == 6
    known = found.similarity[~np.isnan(found.similarity)]
    assert summary["name_similarity"]["mean"] == pytest.approx(known.mean())


def test_true_names_need_a_row(dataset, table):
    with pytest.raises(EmbeddingError, match="no embedding of 1 names: 'red bus'"):
        name_texts(dataset, table(), None)
    assert name_texts(dataset, table("red bus"), None).title == "table"


def test_by_a_text_encoder(dataset):
    asked = []

    def encode(texts):
        asked.extend(texts)
        return np.array([[len(text)] * E for text in texts], np.float32)

    texts = name_texts(dataset, CONFIG, RememberingEncoder(encode, E, 100))
    assert isinstance(texts, EncodedNames)
    texts.true(["bus_(vehicle)"])
    texts.generated([["bus", "red bus"]])
    assert asked == ["a bus (vehicle)", "a bus, red bus"]
    with pytest.raises(EmbeddingError, match=r"gives 8 numbers a text, model\.text_width is 16"):
        name_texts(dataset, CONFIG, RememberingEncoder(encode, 8, 100))


def test_as_part_of_an_evaluation(dataset, inference, tmp_path, capsys):
    config = replace(CONFIG, eval=replace(CONFIG.eval, pictures=0))
    metrics = evaluate(inference, dataset, config, tmp_path / "without", step=3)
    assert "alignment" not in metrics
    asked = replace(config, eval=replace(config.eval, alignment_analysis=True))
    capsys.readouterr()
    with_it = evaluate(inference, dataset, asked, tmp_path / "with", step=3)
    summary = with_it.pop("alignment")
    assert with_it == metrics
    assert (summary["embeddings"], summary["objects"], summary["name_similarity"]["count"]) == ("hashed", 8, 7)
    assert "query–text alignment" in capsys.readouterr().out
    folder = tmp_path / "with" / "eval" / "toy"
    assert json.loads((folder / "metrics.json").read_text())["alignment"] == summary
    assert (folder / "alignment.png").is_file()
    assert not (tmp_path / "without" / "eval" / "toy" / "alignment.png").exists()


@pytest.mark.parametrize("count", [0, 1, 300])
def test_the_picture(tmp_path, count):
    rng = np.random.default_rng(0)
    cosine, similarity = rng.normal((0.55, 0.63), 0.07, (count, 2)).astype(np.float32).T
    similarity[: count // 10] = np.nan
    found = Alignment("hashed", count, cosine, 1 / (1 + np.exp(-cosine)), similarity)
    draw_alignment(found, "toy, step 3", tmp_path / "alignment.png")
    with Image.open(tmp_path / "alignment.png") as picture:
        assert picture.width > 1500
    assert len(list(tmp_path.iterdir())) == 1
    if not count:
        assert found.summary()["name_similarity"] == {"mean": None, "std": None, "count": 0}
        assert "name similarity –" in str(found)
