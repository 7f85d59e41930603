"""Readers and transforms on whatever hypothesis comes up with: a result or a clear error, and boxes that stay on their
objects."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from opendet_jax.config import DataConfig
from opendet_jax.data.datasets import read_annotations
from opendet_jax.data.formats.json_stream import AnnotationError
from opendet_jax.data.formats.records import Record
from opendet_jax.data.images import ImageError, open_image
from opendet_jax.data.prepared.read import pack, unpack
from opendet_jax.data.transforms import (
    Geometry,
    evaluation_geometry,
    fit,
    training_geometry,
    transform_boxes,
    transform_pixels,
)
from tests.data.published import jpeg

EXAMPLES = os.environ.get("FUZZ_EXAMPLES")  # so many of each test, others every time; without it always the same few
few = settings(
    max_examples=int(EXAMPLES or "50"),
    derandomize=EXAMPLES is None,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

odd = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([-1, 0, 1, 2, 3, 2**31, 2**63, -(2**64), 10**400]),
    st.floats(allow_nan=True, allow_infinity=True),
    st.text(max_size=8),
    st.sampled_from(["", " ", "a" * 300, "a, b", ",", "\ud800", "../x", "/x", "a\0b", "b/c.jpg", "木"]),
)
junk = st.recursive(
    odd, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
ids = st.integers(1, 3)
number = st.integers(-5, 30) | st.floats(-5, 30) | st.floats(allow_nan=True, allow_infinity=True)
text = st.sampled_from(["cat", "dog_(animal)", "", "a, b", "\ud800", "é" * 300]) | st.text(max_size=6)


@st.composite
def entries(draw, fields):
    """A list of entries most of whose fields are right."""
    listed = draw(st.lists(st.fixed_dictionaries(fields), max_size=5))
    for entry in listed:
        for name in draw(st.lists(st.sampled_from(sorted(fields)), max_size=1)):
            if draw(st.integers(0, 9)) == 0:
                entry[name] = draw(junk)
            elif draw(st.integers(0, 19)) == 0:
                del entry[name]
    return listed


coco = st.fixed_dictionaries(
    {
        "images": entries(
            {"id": ids, "width": st.integers(1, 30), "height": st.integers(1, 30), "file_name": text.filter(bool)}
        ),
        "annotations": entries(
            {
                "id": st.integers(1, 9),
                "image_id": ids,
                "category_id": ids,
                "bbox": st.lists(number, min_size=4, max_size=4),
                "iscrowd": st.integers(0, 1),
            }
        ),
        "categories": entries({"id": ids, "name": text}),
    }
)
visual_genome = entries(
    {
        "image_id": ids,
        "objects": entries(
            {"object_id": ids, "x": number, "y": number, "w": number, "h": number, "names": st.lists(text, max_size=2)}
        ),
    }
)


def check(annotations, images):
    """Either a clear error, or records that training can use and that come back from an index as they are."""
    try:
        dataset, problems = read_annotations(annotations, images)
    except AnnotationError as error:
        raised = str(error)
        assert raised.startswith(str(annotations.parent))
        assert len(raised) < 500
        return
    assert len(str(problems)) < 10_000
    assert len({record.image_id for record in dataset.records}) == len(dataset)
    categories = {category.id for category in dataset.categories}
    for record in dataset.records:
        assert record.path.is_relative_to(images)
        x0, y0, x1, y1 = record.boxes.T.astype(np.float64)
        assert ((x0 >= 0) & (y0 >= 0) & (x1 <= record.width) & (y1 <= record.height) & (x0 < x1) & (y0 < y1)).all()
        assert len(record.boxes) == len(record.names) == len(record.category_ids)
        assert all(names and all(name and name == name.strip() for name in names) for names in record.names)
        assert all(name.encode() for names in record.names for name in names)
        assert set(record.category_ids.tolist()) <= categories
    again = unpack(pack(dataset.records, dataset.categories, images), annotations, images, {})
    assert again.categories == dataset.categories
    assert [(r.image_id, r.path, r.names) for r in again.records] == [
        (r.image_id, r.path, r.names) for r in dataset.records
    ]


@few
@given(coco | junk)
def test_json_in_cocos_form(tmp_path, content):
    (tmp_path / "a.json").write_text(json.dumps(content))
    check(tmp_path / "a.json", tmp_path)


@few
@given(visual_genome)
def test_visual_genomes_form(tmp_path, content):
    sizes = [{"image_id": i, "width": 8 * i, "height": 20, "url": f"https://x/VG_100K/{i}.jpg"} for i in (1, 2)]
    (tmp_path / "image_data.json").write_text(json.dumps(sizes))
    (tmp_path / "objects.json").write_text(json.dumps(content))
    check(tmp_path / "objects.json", tmp_path)


@few
@given(entries({"image_id": ids, "width": st.integers(1, 9), "height": st.integers(1, 9), "url": text}) | junk)
def test_visual_genomes_sizes(tmp_path, content):
    (tmp_path / "image_data.json").write_text(json.dumps(content))
    (tmp_path / "objects.json").write_text('[{"image_id": 1, "objects": []}]')
    check(tmp_path / "objects.json", tmp_path)


@few
@given(st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_files_of_anything(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    check(tmp_path / "a.json", tmp_path)


@few
@given(coco, st.integers(1, 400), st.binary(min_size=1, max_size=3))
def test_damaged_json(tmp_path, content, place, damage):
    whole = json.dumps(content).encode()
    assume(place < len(whole))
    (tmp_path / "a.json").write_bytes(whole[:place] + damage + whole[place + len(damage) :])
    check(tmp_path / "a.json", tmp_path)


@few
@given(st.integers(0, 700), st.binary(max_size=4))
def test_damaged_images(tmp_path, place, damage):
    whole = jpeg(40, 30, seed=0)
    path = tmp_path / "a.jpg"
    path.write_bytes(whole[:place] + damage + whole[place + len(damage) :])
    try:
        image = open_image(path)
    except ImageError as error:
        raised = str(error)
        assert raised.startswith(str(path))
    else:
        assert image.mode == "RGB"


# Transforms: a filled rectangle is drawn, pixels and boxes are transformed, and the rectangle that is then found in the
# pixels is compared with the transformed box.

sides = st.integers(1, 400)
options = st.fixed_dictionaries(  # of DataConfig
    {
        "flip_probability": st.sampled_from([0.0, 0.5, 1.0]),
        "crop_probability": st.sampled_from([0.0, 0.5, 1.0]),
        "train_short_sides": st.sampled_from([(32,), (48, 64, 200)]),
        "eval_short_side": st.sampled_from([32, 160]),
        "max_long_side": st.sampled_from([64, 333]),
        "crop_short_sides": st.sampled_from([(40, 60), (300,)]),
        "crop_range": st.sampled_from([(1, 30), (38, 60)]),
    }
)


@st.composite
def pictures(draw):
    """Width, height and a box (x0, y0, x1, y1) of whole pixels."""
    width, height = draw(sides), draw(sides)
    x0, y0 = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
    return width, height, (x0, y0, draw(st.integers(x0 + 1, width)), draw(st.integers(y0 + 1, height)))


def drawn(width, height, box):
    pixels = np.zeros((height, width, 3), np.uint8)
    x0, y0, x1, y1 = box
    pixels[y0:y1, x0:x1] = 255
    record = Record(1, Path("a.png"), width, height, np.array([box], np.float32), (("a",),), np.ones(1, np.int64))
    return pixels, record


def assert_box_is_on_its_rectangle(pixels, record, geometry):
    """Every edge within a fifth of a pixel, of the original's pixels where these have become larger."""
    boxes, kept = transform_boxes(record.boxes, geometry)
    picture = transform_pixels(pixels, geometry)
    height, width = geometry.size
    assert picture.shape == (height, width, 3)
    if not kept[0]:
        assert boxes.shape == (0, 4)
        return
    [(cx, cy, w, h)] = boxes.astype(np.float64)
    corners = np.array([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2])
    assert (corners >= -1e-6).all()
    assert (corners <= 1 + 1e-6).all()
    x0, y0, x1, y1 = corners * (width, height, width, height)
    wx0, wy0, wx1, wy1 = geometry.window
    light = picture[..., 0].astype(np.float64)
    assert_edges(light.max(0), x0, x1, pixel=max(1.0, width / (wx1 - wx0)))
    assert_edges(light.max(1), y0, y1, pixel=max(1.0, height / (wy1 - wy0)))


def assert_edges(profile, low, high, pixel):
    """Where a bright stretch begins and ends, from its middle and its length; a thin one is only looked for."""
    if high - low >= 2 * pixel:
        profile = profile / profile.max()
        length = profile.sum()
        middle = (np.arange(len(profile)) + 0.5) @ profile / length
        np.testing.assert_allclose([middle - length / 2, middle + length / 2], [low, high], atol=0.2 * pixel)
    else:
        lit = np.flatnonzero(profile)
        assert (lit + 1 >= low - 1.5 * pixel).all()
        assert (lit <= high + 1.5 * pixel).all()


@few
@example((1, 1, (0, 0, 1, 1)), {}, 0)
@example((8000, 50, (7990, 40, 8000, 50)), {}, 1)
@example((50, 8000, (0, 0, 50, 8000)), {}, 2)
@given(pictures(), options, st.integers(0, 2**32))
def test_boxes_stay_on_their_objects_in_training(picture, chosen, seed):
    pixels, record = drawn(*picture)
    geometry = training_geometry(np.random.default_rng(seed), record, DataConfig(**chosen))
    assert_box_is_on_its_rectangle(pixels, record, geometry)
    fitted = Geometry(geometry.window, fit(geometry.size, (352, 352)), geometry.flip)
    assert max(fitted.size) <= 352
    assert_box_is_on_its_rectangle(pixels, record, fitted)
    boxes, _ = transform_boxes(record.boxes, fitted)
    assert len(boxes) == 1  # a record with objects keeps one


@few
@example((1, 1, (0, 0, 1, 1)), {})
@example((8000, 50, (0, 0, 8000, 50)), {})
@given(pictures(), options)
def test_boxes_stay_on_their_objects_in_evaluation(picture, chosen):
    pixels, record = drawn(*picture)
    assert_box_is_on_its_rectangle(
        pixels, record, evaluation_geometry(record.height, record.width, DataConfig(**chosen))
    )


@few
@given(sides, sides, options, st.integers(0, 2**32), st.integers(0, 400))
def test_any_number_of_boxes(width, height, chosen, seed, count):
    rng = np.random.default_rng(seed)
    corners = np.sort(rng.uniform(0, 1, (count, 2, 2)), axis=1) * (width, height)
    boxes = corners.reshape(count, 4).astype(np.float32)
    boxes = boxes[(boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])]
    record = Record(1, Path("a"), width, height, boxes, (("a",),) * len(boxes), np.ones(len(boxes), np.int64))
    geometry = training_geometry(rng, record, DataConfig(**chosen))
    transformed, kept = transform_boxes(boxes, geometry)
    assert len(transformed) == kept.sum()
    assert not len(boxes) or len(transformed)
    assert np.isfinite(transformed).all()
    assert ((transformed >= 0) & (transformed <= 1)).all()


@pytest.mark.parametrize("shift", [(1, 0, 1, 0), (0, -1, 0, 0), (0, 0, 0, 1)])
def test_the_check_itself_sees_a_box_that_is_a_pixel_off(shift):
    pixels, record = drawn(200, 100, (50, 20, 120, 60))
    geometry = Geometry((0.0, 0.0, 200.0, 100.0), (100, 200), flip=True)
    assert_box_is_on_its_rectangle(pixels, record, geometry)
    wrong = drawn(200, 100, tuple(np.add((50, 20, 120, 60), shift).tolist()))[1]
    with pytest.raises(AssertionError):
        assert_box_is_on_its_rectangle(pixels, wrong, geometry)
