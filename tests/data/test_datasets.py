"""What a config names is read: json files, scenes, a held-out part, a mixture."""

import itertools
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from opendet_jax.config import Config, ConfigError, DataConfig, DatasetPaths
from opendet_jax.config_files import parse_config
from opendet_jax.data.datasets import (
    load_datasets,
    load_evaluation,
    read_annotations,
)
from opendet_jax.data.formats.json_source import AnnotationError
from opendet_jax.data.images import open_record
from opendet_jax.data.pipeline import training_stream
from opendet_jax.data.text_embeddings import HashedEmbedder
from opendet_jax.data.tokenizer import load_tokenizer
from tests.data import published
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
    config = parse_config(json.loads(json.dumps({"data": data})))
    assert config.data.mixture == (DatasetPaths("b", "c", weight=2.0),)
    assert parse_config(config.to_config_dict()) == config


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
        parse_config({"data": values})


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


def names(dataset):
    return [record.names for record in dataset.records]


def assert_pictures_are_there(dataset):
    for record in dataset.records:
        assert open_record(record).size == (record.width, record.height)


def test_visual_genome(tmp_path):
    path = published.visual_genome(tmp_path, images=4)
    dataset, problems = read_annotations(path, tmp_path)
    written = json.loads(path.read_text())
    assert [record.image_id for record in dataset.records] == [1, 2, 3, 4]
    assert names(dataset) == [tuple((o["names"][0],) for o in entry["objects"]) for entry in written]
    first, box = dataset.records[0], written[0]["objects"][0]
    right, bottom = min(box["x"] + box["w"], first.width), min(box["y"] + box["h"], first.height)
    np.testing.assert_array_equal(first.boxes[0], [box["x"], box["y"], right, bottom])
    assert set(problems.counts) == {"box clipped to its image"}
    assert [category.id for category in dataset.categories] == list(range(1, len(dataset.categories) + 1))
    assert tuple(category.name for category in dataset.categories) == dataset.names()
    by_name = {category.name: category.id for category in dataset.categories}
    for record in dataset.records:
        assert record.category_ids.tolist() == [by_name[first] for first, *_ in record.names]
    assert_pictures_are_there(dataset)


@pytest.mark.parametrize("images", [".", "VG_100K"])
def test_visual_genome_pictures_in_one_folder(tmp_path, images):
    path = published.visual_genome(tmp_path, images=3)
    for file in (tmp_path / "VG_100K_2").iterdir():
        file.rename(tmp_path / "VG_100K" / file.name)
    (tmp_path / "VG_100K_2").rmdir()
    assert_pictures_are_there(read_annotations(path, tmp_path / images)[0])


def test_generate_us_json(tmp_path):
    dataset, problems = read_annotations(published.generate_u(tmp_path), tmp_path)
    assert names(dataset) == [(("first",), ("second", "also second")), (("third",), ("object",))]
    assert problems.counts == {}
    assert_pictures_are_there(dataset)


def test_lvis(tmp_path):
    path = published.lvis(tmp_path)
    dataset, problems = read_annotations(path, tmp_path)
    assert names(dataset) == [(("aerosol can",),), (("bus (vehicle)",),), (("aerosol can",),)]
    np.testing.assert_array_equal(dataset.records[0].boxes, [[1.5, 2, 11.5, 14.25]])
    assert [category.frequency for category in dataset.categories] == ["c", "r"]
    assert problems.counts == {}
    assert_pictures_are_there(dataset)


def test_lvis_minival_is_what_lies_in_val2017(tmp_path):
    path = published.lvis(tmp_path)
    dataset, problems = read_annotations(path, tmp_path, minival=True)
    assert [record.image_id for record in dataset.records] == [1, 3]
    assert problems.counts == {}
    shutil.rmtree(tmp_path / "train2017")
    assert_pictures_are_there(dataset)


@pytest.mark.parametrize("images", [".", "val2017"])
def test_coco(tmp_path, images):
    dataset, problems = read_annotations(published.coco(tmp_path), tmp_path / images)
    assert names(dataset) == [(("traffic light",),), ()]
    assert problems.counts == {"crowd region": 1}
    assert_pictures_are_there(dataset)


@pytest.mark.parametrize(
    "unpacked", ["images/{version}/{patch}/{name}", "{version}/{patch}/{name}", "{patch}/{name}", "{name}"]
)
def test_objects365(tmp_path, unpacked):
    dataset, problems = read_annotations(published.objects365(tmp_path, unpacked), tmp_path)
    assert names(dataset) == [(("person",),), (("person",),)]
    assert problems.counts == {}
    (tmp_path / "zhiyuan_objv2_val.json").unlink()
    assert_pictures_are_there(dataset)


def test_a_config_names_the_downloaded_files(tmp_path):
    config = Config().to_config_dict()
    config.data.train.update(annotations=str(published.visual_genome(tmp_path / "vg", 5)), images=str(tmp_path / "vg"))
    lvis = published.lvis(tmp_path / "lvis")
    config.data.eval.update(annotations=str(lvis), images=str(tmp_path / "lvis"), minival=True)
    train, evaluation = load_datasets(parse_config(config), tmp_path)
    assert (len(train.records), len(evaluation)) == (5, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"minival": True}, "objects.json: is in Visual Genome's form: minival is part of LVIS's val"),
        ({"name_field": "caption"}, "objects.json: is in Visual Genome's form, which has no field 'caption'"),
    ],
)
def test_options_of_another_form(tmp_path, options, message):
    with pytest.raises(AnnotationError, match=message):
        read_annotations(published.visual_genome(tmp_path, 1), tmp_path, **options)


def test_minival_needs_the_urls(tmp_path):
    image = {"id": 7, "file_name": "a.jpg", "width": 4, "height": 4}
    path = published.coco_json(tmp_path / "a.json", [image], [], published.CATEGORIES)
    with pytest.raises(AnnotationError, match=r"images\[0\] \(id 7\) has no field 'coco_url'"):
        read_annotations(path, tmp_path, minival=True)


def test_a_folder_that_is_no_data_set(tmp_path):
    with pytest.raises(AnnotationError, match=r"is a folder, and not one that .*prepare.* has written"):
        read_annotations(tmp_path, tmp_path)


def test_a_label_folder_is_read_by_what_it_is_for(tmp_path):
    """The split "train" to train on, "val" to evaluate on, each wherever none is named."""
    yolo, voc = (DatasetPaths(str(make(tmp_path / make.__name__))) for make in (published.yolo, published.pascal_voc))
    mixture, evaluation = load_datasets(Config(data=replace(DATA, train=yolo, mixture=(voc,), eval=yolo)), tmp_path)
    assert [len(part.records) for part in mixture.parts] == [2, 2]
    assert [record.path.parent.parent.name for record in evaluation.records] == ["valid"]
    named = replace(voc, annotations=f"{voc.annotations}:train")
    config = Config(data=replace(DATA, train=named, eval=voc))
    assert [record.path.stem for record in load_evaluation(config, tmp_path).records] == ["2007_000003"]
    held_out = load_evaluation(Config(data=replace(DATA, train=yolo)), tmp_path)
    assert {record.path.parent.parent.name for record in held_out.records} == {"train"}


def test_a_label_folder_in_batches(tmp_path):
    data = replace(DATA, train=DatasetPaths(str(published.yolo(tmp_path))), flip_probability=0.0, max_name_tokens=20)
    mixture, _ = load_datasets(Config(data=data), tmp_path)
    assert set(names_seen(mixture, data, 3)) == {"person", "bus (vehicle)"}
