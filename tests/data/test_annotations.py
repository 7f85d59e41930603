"""Every published data set is read from the files that people download, whatever way they unpacked the pictures."""

import json
import shutil

import numpy as np
import pytest

from opendet_jax.config import Config
from opendet_jax.data.annotations import read_annotations
from opendet_jax.data.datasets import load_datasets
from opendet_jax.data.images import open_record
from opendet_jax.data.json_stream import AnnotationError
from tests.data import published


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
    train, evaluation = load_datasets(Config.from_dict(config), tmp_path)
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
