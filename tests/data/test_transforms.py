"""Boxes stay on their objects, and sizes are those of docs/method.md#1-image."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from opendet_jax.config import DataConfig
from opendet_jax.data.formats.records import Record
from opendet_jax.data.transforms import (
    Geometry,
    choose,
    evaluation_geometry,
    fit,
    pad,
    resized,
    training_geometry,
    transform_boxes,
    transform_pixels,
)

CONFIG = DataConfig(
    train_short_sides=(96, 128, 160),
    max_long_side=240,
    eval_short_side=128,
    crop_short_sides=(100, 120),
    crop_range=(60, 110),
)


def record(boxes, width=200, height=150):
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    count = len(boxes)
    return Record(1, Path("a.png"), width, height, boxes, (("thing",),) * count, np.zeros(count, np.int64))


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("crop", [0.0, 1.0])
def test_box_stays_on_its_rectangle(seed, crop):
    """A white rectangle on black: after the transformation its bright pixels span the transformed box."""
    rng = np.random.default_rng(seed)
    x0, y0 = rng.integers(0, 100), rng.integers(0, 60)
    x1, y1 = x0 + rng.integers(30, 100), y0 + rng.integers(30, 90)
    pixels = np.zeros((150, 200, 3), np.uint8)
    pixels[y0:y1, x0:x1] = 255
    one = record([(x0, y0, x1, y1)])
    geometry = training_geometry(rng, one, replace(CONFIG, crop_probability=crop))
    moved = transform_pixels(pixels, geometry)
    assert moved.shape[:2] == geometry.size
    [box], kept = transform_boxes(one.boxes, geometry)
    assert kept.all()
    (cx, cy, w, h), (height, width) = box, geometry.size
    bright = moved[..., 0] > 127
    rows, columns = np.flatnonzero(bright.any(1)), np.flatnonzero(bright.any(0))
    found = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    expected = ((cx - w / 2) * width, (cy - h / 2) * height, (cx + w / 2) * width, (cy + h / 2) * height)
    np.testing.assert_allclose(found, expected, atol=1.01)


def test_flip_mirrors_pixels_and_boxes():
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 3), dtype=np.uint8)
    plain = Geometry((0.0, 0.0, 8.0, 4.0), (4, 8))
    np.testing.assert_array_equal(transform_pixels(pixels, plain), pixels)
    np.testing.assert_array_equal(transform_pixels(pixels, replace(plain, flip=True)), pixels[:, ::-1])
    boxes, _ = transform_boxes(np.array([[0, 0, 2, 4]], np.float32), replace(plain, flip=True))
    np.testing.assert_allclose(boxes, [[0.875, 0.5, 0.25, 1.0]])


def test_objects_outside_the_window_are_dropped_and_others_clipped():
    boxes = np.array([[0, 0, 10, 10], [10, 0, 30, 10], [40, 0, 50, 20], [45, 5, 60, 30]], np.float32)
    moved, kept = transform_boxes(boxes, Geometry((20.0, 0.0, 40.0, 10.0), (10, 20)))
    assert kept.tolist() == [False, True, False, False]
    np.testing.assert_allclose(moved, [[0.25, 0.5, 0.5, 1.0]])


def test_a_crop_never_loses_every_object():
    small = record([(0, 0, 4, 4)])
    for seed in range(200):
        geometry = training_geometry(np.random.default_rng(seed), small, replace(CONFIG, crop_probability=1.0))
        assert transform_boxes(small.boxes, geometry)[1].any()


def test_crop_windows_have_the_configured_sides():
    """`crop_range` counts pixels of the picture whose shorter side is one of `crop_short_sides`."""
    whole = record([(0, 0, 200, 150)])
    config = replace(CONFIG, crop_probability=1.0, crop_short_sides=(120,))
    windows = [training_geometry(np.random.default_rng(s), whole, config).window for s in range(100)]
    sides = np.array([(x1 - x0, y1 - y0) for x0, y0, x1, y1 in windows]) * 120 / 150
    assert sides.min() >= 59.9
    assert sides.max() <= 110.1
    assert sides.max() - sides.min() > 40
    corners = np.array(windows)
    assert corners.min() >= 0
    assert (corners[:, 2:] <= (200, 150)).all()


def test_short_sides_are_drawn_from_the_list():
    whole = record([(0, 0, 200, 150)])
    config = replace(CONFIG, crop_probability=0.0)
    sizes = {training_geometry(np.random.default_rng(s), whole, config).size for s in range(50)}
    assert sizes == {(96, 128), (128, 171), (160, 213)}


def test_resized():
    assert resized((480, 640), 800, 1333) == (800, 1067)
    assert resized((640, 480), 800, 1333) == (1067, 800)
    assert resized((400, 1000), 800, 1333) == (533, 1333)
    assert resized((1, 10_000), 800, 1333) == (1, 1333)
    assert evaluation_geometry(150, 300, CONFIG).size == (120, 240)


def test_buckets():
    buckets = ((800, 1344), (1344, 800), (1088, 1088))
    assert choose((800, 1067), buckets) == 0
    assert choose((1067, 800), buckets) == 1
    assert choose((1000, 1000), buckets) == 2
    assert choose((1000, 1333), buckets) == 2  # shrinks by 0.82 there, by 0.8 in the first
    assert fit((800, 1067), buckets[0]) == (800, 1067)
    assert fit((1000, 1333), buckets[2]) == (816, 1088)
    assert fit((1, 5000), (32, 64)) == (1, 64)


def test_pad():
    pixels = np.full((2, 3, 3), 9, np.uint8)
    padded, mask = pad(pixels, (4, 5))
    assert padded.shape == (4, 5, 3)
    assert mask[:2, :3].all()
    assert mask.sum() == 6
    assert (padded[mask] == 9).all()
    assert (padded[~mask] == 0).all()
