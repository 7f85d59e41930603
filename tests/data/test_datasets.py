"""What a config names is read: json files, scenes, a held-out part, a mixture."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
from absl import logging
from PIL import Image

from opendet_jax.config import Config, ConfigError, DataConfig, DatasetPaths
from opendet_jax.data.datasets import hold_out, load_datasets, load_evaluation
from opendet_jax.data.json_source import AnnotationError, read_json
from opendet_jax.data.pipeline import training_stream
from opendet_jax.data.text_embeddings import HashedEmbedder
from opendet_jax.data.tokenizer import load_tokenizer
from tests.data.names import decode_names

DATA = DataConfig(
    batch_size=4,
    buckets=((64, 64),),
    train_short_sides=(48,),
    max_long_side=64,
    crop_probability=0.0,
    max_objects=4,
    threads=0,
    prefetch=0,
)
IMAGES = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two jsons over the same pictures and ids: animals, named by category, and things, by a field of their own."""
    root = tmp_path_factory.mktemp("sets")
    for i in range(IMAGES):
        Image.new("RGB", (60, 50), (10 * i, 0, 0)).save(root / f"{i}.png")
    images = [{"id": i, "file_name": f"{i}.png", "width": 60, "height": 50} for i in range(IMAGES)]
    boxes = [{"id": i, "image_id": i, "category_id": 1, "bbox": [5, 5, 20, 20]} for i in range(IMAGES)]
    for name, category in (("animals", "cat"), ("things", "object")):
        annotations = [{**box, "label": f"{name} {box['id'] % 3}"} for box in boxes] if name == "things" else boxes
        content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": category}]}
        (root / f"{name}.json").write_text(json.dumps(content))
    return root


def paths(folder, name, **others) -> DatasetPaths:
    return DatasetPaths(str(folder / f"{name}.json"), str(folder), **others)


def names_seen(mixture, data, steps):
    tokenizer = load_tokenizer("byt5", 384)
    stream = training_stream(mixture, data, tokenizer, HashedEmbedder(16), 0)
    batches = [example.batch.objects for example in itertools.islice(stream, steps)]
    return [name for objects in batches for name in decode_names(tokenizer, objects.tokens[objects.valid])]


def test_both_jsons_are_read_and_cut(folder):
    data = replace(DATA, train=paths(folder, "animals"), eval=paths(folder, "things"), train_limit=4)
    config = Config(data=data)
    train, evaluation = load_datasets(config, folder)
    assert (len(train.records), len(evaluation)) == (4, IMAGES)
    config = replace(config, eval=replace(config.eval, limit=2))
    assert len(load_datasets(config, folder)[1]) == len(load_evaluation(config, folder)) == 2


def test_scenes_are_drawn_once(tmp_path):
    config = Config(data=replace(DATA, source="scenes", scenes_train=4, scenes_eval=3, scenes_size=48))
    train, evaluation = load_datasets(config, tmp_path)
    [part] = train.parts
    assert (len(part.records), len(evaluation)) == (4, 3)
    jsons = (part.annotations, evaluation.annotations)
    groups = [{c["id"]: c["frequency"] for c in json.loads(path.read_text())["categories"]} for path in jsons]
    assert groups[0] == groups[1]
    stamps = [path.stat().st_mtime_ns for path in jsons]
    assert load_evaluation(config, tmp_path).annotations == evaluation.annotations
    load_datasets(config, tmp_path)
    assert [path.stat().st_mtime_ns for path in jsons] == stamps


def test_a_part_is_held_out_where_there_is_nothing_to_evaluate_on(folder, caplog):
    logging.use_absl_handler()
    config = Config(data=replace(DATA, train=paths(folder, "animals"), held_out=0.2))
    with caplog.at_level("WARNING"):
        train, evaluation = load_datasets(config, folder)
    assert "HELD OUT FOR EVALUATION: 4 of the 20 images" in caplog.text
    ids = [{record.image_id for record in records} for records in (train.records, evaluation.records)]
    assert (len(ids[0]), len(ids[1])) == (16, 4)
    assert not ids[0] & ids[1]
    again = load_evaluation(config, folder)
    assert [record.image_id for record in again.records] == [record.image_id for record in evaluation.records]


def test_what_is_held_out_hardly_changes_with_more_images(folder):
    whole = read_json(folder / "animals.json", folder)[0]
    few, many = ({r.image_id for r in hold_out(set_, 0.2)[1].records} for set_ in (whole.first(15), whole))
    assert len(few) == 3
    assert len(few & many) >= 2
    assert [len(part) for part in hold_out(whole.first(2), 0.9)] == [1, 1]


def test_evaluating_on_the_training_images_is_said_loudly(folder, caplog):
    logging.use_absl_handler()
    config = Config(data=replace(DATA, train=paths(folder, "animals"), held_out=0.0))
    with caplog.at_level("WARNING"):
        train, evaluation = load_datasets(config, folder)
    assert "EVALUATED ON WHAT IT IS TRAINED ON" in caplog.text
    assert train.records == evaluation.records


def test_a_mixture_brings_its_names_however_ids_collide(folder):
    things = paths(folder, "things", name_field="label", weight=0.5)
    data = replace(DATA, train=paths(folder, "animals"), eval=paths(folder, "animals"), mixture=(things,))
    mixture, _ = load_datasets(Config(data=data), folder)
    assert mixture.names() == ("cat", "things 0", "things 1", "things 2")
    assert mixture.shows == IMAGES + IMAGES // 2
    seen = names_seen(mixture, data, steps=7)  # all but two of the thirty images of an epoch
    assert 18 <= seen.count("cat") <= 20
    assert {name for name in seen if name != "cat"} == {"things 0", "things 1", "things 2"}


def test_mixture_from_plain_values(folder):
    """As a config file or a config.json writes it."""
    data = {"train": {"annotations": "a"}, "mixture": [{"annotations": "b", "images": "c", "weight": 2}]}
    config = Config.from_dict(json.loads(json.dumps({"data": data})))
    assert config.data.mixture == (DatasetPaths("b", "c", weight=2.0),)
    assert Config.from_dict(config.to_config_dict()) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mixture": [{"annotations": "b", "weight": 0}]}, r"data\.mixture\[0\]\.weight = 0\.0: must be positive"),
        ({"mixture": [{"anotations": "b"}]}, r"did you mean config\.data\.mixture\.annotations"),
        ({"eval": {"weight": 2.0}}, r"data\.eval\.weight = 2\.0: must be 1"),
        ({"held_out": 1.0}, r"data\.held_out = 1\.0"),
        ({"max_unreadable": 1.5}, r"data\.max_unreadable = 1\.5: must be between 0 and 1"),
    ],
)
def test_values_that_cannot_work(values, message):
    with pytest.raises(ConfigError, match=message):
        Config.from_dict({"data": values})


def test_no_json_is_named(folder):
    with pytest.raises(ConfigError, match=r"config\.data\.train\.annotations is empty"):
        load_datasets(Config(data=DATA), folder)
    data = replace(DATA, train=paths(folder, "animals"), eval=paths(folder, "animals"), mixture=(DatasetPaths(),))
    with pytest.raises(ConfigError, match=r"config\.data\.mixture\[0\]\.annotations is empty"):
        load_datasets(Config(data=data), folder)


def test_a_name_field_that_nothing_has(folder):
    data = replace(DATA, train=paths(folder, "things", name_field="labl"))
    with pytest.raises(AnnotationError, match=r"things\.json: no annotation has the field 'labl'"):
        load_datasets(Config(data=data), folder)


def test_each_set_of_a_mixture_has_objects(folder, tmp_path):
    (tmp_path / "empty.json").write_text(json.dumps({"images": [], "annotations": [], "categories": []}))
    data = replace(DATA, train=paths(folder, "animals"), mixture=(DatasetPaths(str(tmp_path / "empty.json")),))
    with pytest.raises(AnnotationError, match=r"empty\.json: no image has an object to train on"):
        load_datasets(Config(data=data), folder)


def test_pixels_of_a_mixture_are_those_of_its_own_folder(folder, tmp_path):
    """The same file names in another folder are other pictures."""
    for i in range(IMAGES):
        Image.new("RGB", (60, 50), (0, 200, 0)).save(tmp_path / f"{i}.png")
    things = replace(paths(folder, "things"), images=str(tmp_path))
    data = replace(DATA, train=paths(folder, "animals"), eval=paths(folder, "animals"), mixture=(things,))
    mixture, _ = load_datasets(Config(data=data), folder)
    stream = training_stream(mixture, data, load_tokenizer("byt5", 384), HashedEmbedder(16), 0)
    green = [bool((p[0, 0] == (0, 200, 0)).all()) for e in itertools.islice(stream, 10) for p in e.batch.images.pixels]
    assert np.sum(green) == 20
