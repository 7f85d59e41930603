"""What an evaluation loads to judge names, and what it refuses; the mapping by a text encoder in a whole evaluation."""

import json
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from opendet_jax.config import Config, ConfigError, DataConfig, EvalConfig
from opendet_jax.config_files import validate
from opendet_jax.data.formats.json_source import read_json
from opendet_jax.data.formats.records import Dataset
from opendet_jax.errors import WeightsError
from opendet_jax.evaluate import loop
from opendet_jax.evaluate.loop import Naming, evaluate, load_naming
from opendet_jax.evaluate.name_mapping import ExactMapping, TextEncoderMapping
from opendet_jax.evaluate.name_similarity import EmbeddedNames
from opendet_jax.evaluate.results import ImageResults
from opendet_jax.inference import Found, Inference

CLASSES = 20
CONFIG = Config(
    data=DataConfig(name="toy", eval_short_side=32, buckets=((32, 32),)),
    eval=EvalConfig(batch_size=1, pictures=0),
)


def pictures(folder: Path, count: int) -> Dataset:
    """Black ones, each with a box of class 7."""
    Image.new("RGB", (32, 32)).save(folder / "0.png")
    ids = range(5, 5 + count)
    content = {
        "images": [{"id": i, "file_name": "0.png", "width": 32, "height": 32} for i in ids],
        "annotations": [{"id": i, "image_id": i, "category_id": 7, "bbox": [4, 4, 8, 8]} for i in ids],
        "categories": [{"id": i, "name": f"class {i}"} for i in range(CLASSES)],
    }
    (folder / "toy.json").write_text(json.dumps(content))
    return read_json(folder / "toy.json", folder)[0]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return pictures(tmp_path_factory.mktemp("toy"), 1)


def with_eval(**fields) -> Config:
    return replace(CONFIG, eval=replace(CONFIG.eval, **fields))


def test_nothing_is_loaded_that_is_not_needed(dataset):
    naming = load_naming(dataset, with_eval(text_encoder="nowhere"))
    assert isinstance(naming.mapping, ExactMapping)
    assert naming.texts is None
    assert isinstance(load_naming(dataset, with_eval(alignment_analysis=True)).texts, EmbeddedNames)


@pytest.mark.parametrize("fields", [{"name_mapping": "text_encoder"}, {"alignment_analysis": True}])
def test_a_missing_encoder_is_an_error_at_once(dataset, fields):
    with pytest.raises(WeightsError, match=r"eval\.text_encoder: nowhere: holds no converted weights"):
        load_naming(dataset, with_eval(text_encoder="nowhere", **fields))


def test_the_config_asks_for_an_encoder():
    with pytest.raises(ConfigError, match=r"eval\.text_encoder = '': must be the folder of a converted CLIP"):
        validate(with_eval(name_mapping="text_encoder"))
    with pytest.raises(ConfigError, match=r"eval\.max_detections = -1: must be at least 0"):
        validate(with_eval(max_detections=-1))
    validate(with_eval(name_mapping="text_encoder", text_encoder="clip"))


class Thirty(Inference):
    """Thirty boxes, the fifth of them right; the name of box i is nearest to class i."""

    def __init__(self):
        pass

    def __call__(self, images, sizes, selection, given=None):
        assert selection.max_detections == CONFIG.model.max_queries == 900  # all queries
        low = np.linspace(20, 24, 30)[:, None] + np.zeros(2)
        boxes = np.concatenate([low, low + 6], axis=1).astype(np.float32)
        boxes[4] = 4, 4, 12, 12
        scores = np.linspace(1, 0.25, 30).astype(np.float32)
        names = [[f"name {7 if i == 4 else i % CLASSES}", "other"] for i in range(30)]
        return [Found(boxes, scores, names, np.zeros((30, 2), np.float32))]


def encode(texts):
    """A name is as near to its class as 0.64, all others 0.16; of the other beams nothing is heard."""
    places = [int(text.split(",")[0].split()[-1]) for text in texts]
    rows = np.full((len(texts), CLASSES), 0.16, np.float32)
    rows[np.arange(len(texts)), places] = 0.64
    return np.eye(CLASSES, dtype=np.float32)[places] if texts[0].startswith("a class") else rows


def test_an_evaluation_by_text_encoder(dataset, tmp_path):
    categories = [{"id": category.id, "name": category.name} for category in dataset.categories]
    naming = Naming(TextEncoderMapping(categories, encode), None)
    metrics = evaluate(Thirty(), dataset, CONFIG, tmp_path, 0, naming)
    assert (metrics["name_mapping"], metrics["detections"]) == ("text_encoder", 30)
    assert metrics["recall50"] == metrics["naming_accuracy"] == 1
    assert metrics["exact_name_accuracy"] == 0  # "name 7" is not "class 7"
    predictions = json.loads((tmp_path / "eval" / "toy" / "predictions.json").read_text())
    assert len(predictions) == 300  # of 30 · 15
    scores = [entry["score"] for entry in predictions]
    assert scores == sorted(scores, reverse=True)
    assert predictions[0]["category_id"] == 0
    assert predictions[0]["score"] == pytest.approx(0.8)
    [right] = [entry for entry in predictions if entry["category_id"] == 7 and entry["bbox"] == [4, 4, 8, 8]]
    p = 1 - 4 * 0.75 / 29
    assert right["score"] == pytest.approx((0.64 * p) ** 0.5)
    assert right["names"] == ["name 7", "other"]
    # Boxes 7 and 27 are named so too, and score less.
    assert metrics["AP"] == pytest.approx(1)


def test_a_limit_is_passed_on(dataset, tmp_path):
    class Limited(Thirty):
        def __call__(self, images, sizes, selection, given=None):
            assert selection.max_detections == 12
            return [Found(*(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), [], np.zeros((0, 2), np.float32)))]

    assert evaluate(Limited(), dataset, with_eval(max_detections=12), tmp_path, 0)["max_detections"] == 12


def test_images_are_forgotten_one_by_one(tmp_path, monkeypatch):
    made, alive = [], []

    def make(*arguments):
        results = ImageResults(*arguments)
        made.append(weakref.ref(results))
        alive.append(sum(reference() is not None for reference in made))
        return results

    monkeypatch.setattr(loop, "ImageResults", make)
    dataset = pictures(tmp_path, 6)
    categories = [{"id": category.id, "name": category.name} for category in dataset.categories]
    evaluate(Thirty(), dataset, CONFIG, tmp_path, 0, Naming(TextEncoderMapping(categories, encode), None))
    assert len(alive) == 6
    assert max(alive) <= 2  # the one that is made, and the one before
