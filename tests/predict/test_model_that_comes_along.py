"""opendet_jax.load("scenes_tiny"): small, complete, and it names drawn shapes that it has not seen."""

import numpy as np
import pytest

import opendet_jax
from opendet_jax.checkpoints.folder import MODEL, MODELS
from opendet_jax.data.scene_drawing import KINDS, draw_scene

SCENES = 12


def test_it_is_small_and_has_a_card():
    folder = MODELS / "scenes_tiny"
    assert (folder / MODEL).stat().st_size <= 12 * 2**20
    card = (folder / "README.md").read_text()
    assert "drawn shapes" in card
    assert "Apache-2.0" in card


@pytest.fixture(scope="module")
def detector():
    return opendet_jax.load("scenes_tiny")


def test_most_objects_of_new_scenes_are_found_and_named(detector):
    found = named = objects = 0
    for index in range(SCENES):
        scene, truth = draw_scene(seed=99, split="val", index=index, size=128)
        detections = detector.detect(scene)
        for item in truth:
            x, y, width, height = item.box
            objects += 1
            if not len(detections):
                continue
            overlaps = iou(np.array([x, y, x + width, y + height]), detections.boxes)
            found += overlaps.max() > 0.5
            named += detections.names[int(overlaps.argmax())] == KINDS[item.kind].name
    assert objects > 30
    assert found / objects > 0.9
    assert named / objects > 0.6


def iou(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    corners = np.maximum(box[:2], boxes[:, :2]), np.minimum(box[2:], boxes[:, 2:])
    common = np.prod(np.maximum(corners[1] - corners[0], 0), axis=1)
    areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) + np.prod(box[2:] - box[:2])
    return common / (areas - common)
