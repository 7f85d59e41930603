"""Fine-tuning on a json of one's own, as docs/finetune.md does it: photographs in COCO's form, from a checkpoint."""

import json
import math
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jaxtyping
import numpy as np
import pytest

import opendet_jax
from opendet_jax.checkpoints.folder import Converted, save
from opendet_jax.checkpoints.restore import restore
from opendet_jax.config import Config, ConfigError
from opendet_jax.config_files import config_from_arguments
from opendet_jax.data.datasets import load_evaluation
from opendet_jax.evaluate.loop import evaluate_checkpoint
from opendet_jax.model.opendet import OpenDet, init_params
from opendet_jax.train.training_loop import train
from opendet_jax.weights.init import initialise
from tests.golden.parameters import shipped
from tests.model.conftest import SHALLOW

IMAGES, STEPS = 12, 3
# How ml_collections loads a config file.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


@contextmanager
def unchecked_shapes():
    """eval_shape passes shapes where annotations want arrays."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def coco(data_folder, tmp_path_factory) -> Path:
    """minilvis in COCO's form: no frequencies, no lists of absent classes, and each box with a name of its own, too."""
    content = json.loads((data_folder / "minilvis/train.json").read_text())
    images = content["images"][:IMAGES]
    kept = {image["id"] for image in images}
    names = {category["id"]: category["name"] for category in content["categories"]}
    annotations = [
        {key: a[key] for key in ("id", "image_id", "category_id", "bbox", "area")}
        | {"iscrowd": 0, "label": f"my {names[a['category_id']]}"}
        for a in content["annotations"]
        if a["image_id"] in kept
    ]
    path = tmp_path_factory.mktemp("coco") / "mine.json"
    coco = {
        "images": [{key: image[key] for key in ("id", "file_name", "width", "height")} for image in images],
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for number, name in names.items()],
    }
    path.write_text(json.dumps(coco))
    return path


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """A whole model with the parts of the large one, which knows scenes."""
    scenes = shipped("scenes_tiny")
    model = replace(SHALLOW, t5=replace(SHALLOW.t5, vocab_size=scenes.model.t5.vocab_size))
    data = replace(scenes.data, batch_size=2, max_objects=8, buckets=((64, 64),), train_short_sides=(64,))
    config = replace(
        scenes,
        model=model,
        data=replace(data, eval_short_side=64, max_long_side=64),
        eval=replace(scenes.eval, batch_size=2, max_detections=5, max_new_tokens=4, pictures=2),
    )
    rng = np.random.default_rng(0)

    def drawn(path, leaf) -> np.ndarray:
        centre = 1.0 if path[-1].key == "scale" else 0.0  # of a norm
        return rng.normal(centre, 0.1, leaf.shape).astype(leaf.dtype)

    with unchecked_shapes():
        shapes = jax.eval_shape(partial(init_params, OpenDet(model)), jax.random.key(0))
    params = jax.tree_util.tree_map_with_path(drawn, shapes)
    folder = tmp_path_factory.mktemp("start") / "weights"
    save(folder, Converted("opendet", config.to_dict(), params), {"source": "a test"})
    return folder


@pytest.fixture(scope="module")
def config(start, coco, data_folder) -> Config:
    return config_from_arguments(
        [
            f"--config=configs/coco_json.py:{start}",
            f"--config.data.train.annotations={coco}",
            f"--config.data.train.images={data_folder}/minilvis/images",
            f"--config.train.steps={STEPS}",
            "--config.train.log_every=1",
            "--config.data.held_out=0.25",
            "--config.data.max_name_tokens=25",  # "train (railroad vehicle)" has one more than the names of scenes
        ]
    )


@pytest.fixture(scope="module")
def tuned(config, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("run")
    train(config, workdir)
    return workdir


def test_the_start_is_the_checkpoint(config, start):
    _, wanted, _ = restore(start)
    random = jax.tree.map(np.zeros_like, wanted)
    jax.tree.map(np.testing.assert_array_equal, initialise(random, config), wanted)


def test_losses_are_finite_and_the_weights_move_from_there(tuned, start):
    rows = [json.loads(line) for line in (tuned / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert all(math.isfinite(value) for row in rows for value in row.values())
    (_, before, _), (_, after, step) = restore(start), restore(tuned)
    assert step == STEPS
    moved = [float(np.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (before, after)), strict=True)]
    assert max(moved) < 1e-3  # three warm-up steps; other random numbers are 0.1 away
    assert np.mean(np.array(moved) > 0) > 0.9


def test_it_is_evaluated_on_what_was_held_out(tuned, config):
    path = tuned / "eval" / "coco_json" / "metrics.json"
    metrics = json.loads(path.read_text())
    held = load_evaluation(config, tuned)
    assert (metrics["images"], metrics["step"]) == (len(held), STEPS)
    assert IMAGES // 4 <= len(held) < IMAGES // 2, "a quarter, and one of each class that has two"
    assert metrics["APr"] is None
    assert 0 <= metrics["AP"] <= 1
    evaluate_checkpoint(config, tuned)
    assert json.loads(path.read_text()) == metrics


def test_it_detects(tuned, data_folder):
    detector = opendet_jax.load(tuned)
    photograph = next((data_folder / "minilvis/images").glob("*.jpg"))
    found = detector.detect(photograph, max_detections=5, min_score=0.0)
    assert len(found) > 0
    assert found.draw(photograph).width > 100


def test_names_of_annotations(config, coco):
    from opendet_jax.data.datasets import load_datasets

    named = replace(config.data.train, name_field="label")
    mixture, _ = load_datasets(replace(config, data=replace(config.data, train=named)), coco.parent)
    assert all(name.startswith("my ") for name in mixture.names())


def test_from_nothing_the_config_is_a_small_model():
    config = config_from_arguments(["--config=configs/coco_json.py", "--config.data.train.annotations=a.json"])
    assert (config.name, config.data.tokenizer, config.data.text_embeddings) == ("coco_json", "byt5", "hashed")
    assert config.init.model == config.data.eval.annotations == ""


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(ConfigError, match="holds no converted weights"):
        config_from_arguments([f"--config=configs/coco_json.py:{tmp_path}"])
