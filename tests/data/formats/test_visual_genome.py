"""Visual Genome's own files: names, ids, boxes, and what is said where something is wrong."""

import json

import numpy as np
import pytest

from opendet_jax.data.formats.json_stream import AnnotationError
from opendet_jax.data.formats.visual_genome import read_visual_genome

IMAGE = {"image_id": 5, "width": 100, "height": 50, "url": "https://x/VG_100K/5.jpg"}
OBJECT = {"object_id": 11, "x": 10, "y": 20, "w": 30, "h": 15, "names": ["old tree"], "synsets": []}


def write(tmp_path, objects=(OBJECT,), images=(IMAGE,), entries=None):
    (tmp_path / "image_data.json").write_text(json.dumps(list(images)))
    path = tmp_path / "objects.json"
    path.write_text(json.dumps([{"image_id": 5, "objects": list(objects)}] if entries is None else entries))
    return path


def read(tmp_path, *arguments, **options):
    return read_visual_genome(write(tmp_path, *arguments, **options), tmp_path)


def test_several_names_of_a_box(tmp_path):
    objects = [{**OBJECT, "names": [" wood", "", "bark"]}, {**OBJECT, "object_id": 12, "names": ["bark", "a, b"]}]
    dataset, problems = read(tmp_path, objects)
    [record] = dataset.records
    assert record.names == (("wood", "bark"), ("bark", "a, b"))
    assert [(category.id, category.name) for category in dataset.categories] == [(1, "a, b"), (2, "bark"), (3, "wood")]
    assert record.category_ids.tolist() == [3, 2]
    np.testing.assert_array_equal(record.boxes, [[10, 20, 40, 35]] * 2)
    assert problems.counts == {}


def test_names_without_a_usable_box_are_no_category(tmp_path):
    dataset, _ = read(tmp_path, [OBJECT, {**OBJECT, "object_id": 12, "names": ["ghost"], "x": 500}])
    assert [category.name for category in dataset.categories] == ["old tree"]


def test_ids_of_version_one(tmp_path):
    objects = [{("id" if key == "object_id" else key): value for key, value in OBJECT.items()}]
    dataset, _ = read(tmp_path, entries=[{"id": 5, "objects": objects}])
    assert [(record.image_id, record.names) for record in dataset.records] == [(5, (("old tree",),))]


def test_the_same_box_twice_stays_twice(tmp_path):
    dataset, problems = read(tmp_path, [OBJECT, OBJECT, {**OBJECT, "object_id": 12}])
    assert len(dataset.records[0].boxes) == 3
    assert problems.counts == {"repeated object id, box kept": 1}


def test_an_image_twice(tmp_path):
    entry = {"image_id": 5, "objects": [OBJECT]}
    dataset, problems = read(tmp_path, entries=[entry, {**entry, "objects": [{**OBJECT, "object_id": 12}]}])
    assert [len(record.boxes) for record in dataset.records] == [2]
    assert problems.counts == {"repeated image, its objects added to the first": 1}


def test_images_without_a_size_or_without_objects(tmp_path):
    images = [IMAGE, {**IMAGE, "image_id": 6, "url": "https://x/VG_100K/6.jpg"}]
    dataset, problems = read(tmp_path, images=images, entries=[{"image_id": i, "objects": []} for i in (5, 7)])
    assert [(record.image_id, len(record.boxes)) for record in dataset.records] == [(5, 0)]
    assert problems.counts == {"image that is not in image_data.json": 1}
    assert "[1] (image 7)" in str(problems)


def test_objects_of_images_without_a_size_are_counted(tmp_path):
    objects = [OBJECT, {**OBJECT, "object_id": 12}]
    dataset, problems = read(tmp_path, entries=[{"image_id": 5, "objects": []}, {"image_id": 7, "objects": objects}])
    assert len(dataset.records[0].boxes) == 0
    assert problems.counts == {
        "image that is not in image_data.json": 1,
        "object of an image that is not in image_data.json": 2,
    }


def test_one_file_of_several_images_is_counted(tmp_path):
    images = [IMAGE, {**IMAGE, "image_id": 6}]
    entries = [{"image_id": i, "objects": [{**OBJECT, "object_id": i}]} for i in (5, 6)]
    dataset, problems = read(tmp_path, images=images, entries=entries)
    assert len(dataset) == 2
    assert problems.counts == {"file of another image id too, image kept": 1}


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"x": float("nan")}, "box is not four finite numbers"),
        ({"w": 0}, "box without area"),
        ({"h": -4}, "box without area"),
        ({"x": 100}, "box outside its image"),
        ({"x": -5}, "box clipped to its image"),
        ({"names": []}, "empty name"),
        ({"names": [" "]}, "empty name"),
        ({"names": ["a" * 300]}, "name of more than 200 characters, kept"),
    ],
)
def test_unusable_objects_are_counted(tmp_path, change, kind):
    dataset, problems = read(tmp_path, [{**OBJECT, **change}, {**OBJECT, "object_id": 12}])
    kept = kind.startswith("name of") or "clipped" in kind
    assert len(dataset.records[0].boxes) == 1 + kept
    assert problems.counts == {kind: 1}
    assert "[0] (image 5).objects[0] (object 11)" in str(problems)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objects": [{**OBJECT, "names": "tree"}]}, "objects.json: .*field 'names' is 'tree', not a list of strings"),
        ({"objects": [{**OBJECT, "names": [5]}]}, r"objects.json: .*field 'names' is \[5\], not a list of strings"),
        ({"objects": ["tree"]}, r"\[0\] \(image 5\).objects\[0\] has no field 'object_id'"),
        ({"objects": [{"object_id": 11}]}, r"\[0\] \(image 5\).objects\[0\] \(object 11\) has no field 'x'"),
        ({"entries": [5]}, r"objects.json: \[0\] has no field 'image_id'"),
        ({"entries": [{"image_id": 5}]}, r"objects.json: \[0\] \(image 5\) has no field 'objects'"),
        ({"entries": [{"image_id": 5, "objects": {}}]}, "field 'objects' is {}, not a list"),
        ({"images": [{**IMAGE, "width": 0}]}, r"image_data.json: \[0\] \(image 5\): field 'width' is not positive"),
        ({"images": [{**IMAGE, "url": "/"}]}, r"image_data.json: \[0\] \(image 5\): .* is not a path inside"),
        ({"images": [IMAGE, {**IMAGE, "width": 9}]}, r"image_data.json: \[1\] \(image 5\): the id occurs twice"),
    ],
)
def test_errors_name_file_entry_and_field(tmp_path, options, message):
    with pytest.raises(AnnotationError, match=message):
        read(tmp_path, **options)


def test_sizes_that_are_missing(tmp_path):
    path = write(tmp_path)
    (tmp_path / "image_data.json").unlink()
    with pytest.raises(
        AnnotationError, match=r"objects\.json: is a list, .* in image_data\.json, which is not beside it"
    ):
        read_visual_genome(path, tmp_path)
    (tmp_path / "image_data.json").write_text('{"images": []}')
    with pytest.raises(AnnotationError, match=r"image_data\.json: is not a list of images"):
        read_visual_genome(path, tmp_path)
