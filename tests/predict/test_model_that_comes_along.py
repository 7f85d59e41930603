"""opendet_jax.load("scenes_tiny"): small, complete, and it names drawn shapes that it has not seen."""

import json
import os
import subprocess
import sys

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


def scenes(count):
    return [draw_scene(seed=98, split="val", index=index, size=128) for index in range(count)]


def test_a_batch_gives_what_its_images_give_alone(detector):
    pictures = [scene for scene, _ in scenes(6)]
    together = detector.detect(pictures, batch_size=4)  # four, and two that are filled up
    assert sum(map(len, together)) > 10
    for picture, found in zip(pictures, together, strict=True):
        alone = detector.detect(picture)
        assert found.names == alone.names
        assert found.alternatives == alone.alternatives
        np.testing.assert_allclose(found.boxes, alone.boxes, atol=128 * 1e-5)
        np.testing.assert_allclose(found.scores, alone.scores, atol=1e-5)
        np.testing.assert_allclose(found.name_scores, alone.name_scores, atol=1e-4)


@pytest.mark.parametrize("by", ["alignment", "language"])
def test_given_names(detector, by):
    """Objects get their names among those of all kinds; of one kind alone, it is found and the others score low."""
    pairs, every = scenes(8), [kind.name for kind in KINDS]
    named = objects = 0
    of_one, of_others = [], []
    for scene, truth in pairs:
        found = detector.detect(scene, names=every, by=by, min_score=0.0)
        assert {*found.names}.issubset(every)
        assert all(1 + len(others) <= 3 and len({name, *others}) == 1 + len(others) for name, others in named_of(found))
        assert (found.scores[:-1] >= found.scores[1:]).all()
        one = detector.detect(scene, names=[KINDS[truth[0].kind].name], by=by, min_score=0.0)
        assert {*one.names} == {KINDS[truth[0].kind].name}
        assert not any(one.alternatives)
        for item in truth:
            x, y, width, height = item.box
            box = np.array([x, y, x + width, y + height])
            objects += 1
            named += found.names[int(iou(box, found.boxes).argmax())] == KINDS[item.kind].name
            score = one.scores[int(iou(box, one.boxes).argmax())]
            (of_one if item.kind == truth[0].kind else of_others).append(score)
    assert objects > 20
    assert named / objects > (0.3 if by == "alignment" else 0.6)  # of len(KINDS) names
    assert np.mean(of_one) > (2 if by == "alignment" else 5) * np.mean(of_others)


def named_of(found):
    return zip(found.names, found.alternatives, strict=True)


def test_by_language_the_score_of_a_name_is_what_it_is_when_the_model_is_free(detector):
    scene, _ = scenes(1)[0]
    free = detector.detect(scene, min_score=0.0, max_detections=5)
    given = detector.detect(scene, min_score=0.0, max_detections=5, names=free.names, by="language")
    for place in range(len(free)):
        again = int(np.abs(given.boxes - free.boxes[place]).sum(axis=1).argmin())
        assert given.names[again] == free.names[place]
        np.testing.assert_allclose(given.name_scores[again, 0], free.name_scores[place, 0], atol=1e-4)
        tokens = len(free.names[place].encode()) + 1
        expected = free.scores[place] * np.exp(tokens * free.name_scores[place, 0])
        np.testing.assert_allclose(given.scores[again], expected, atol=1e-5)
    assert json.loads(given.to_json())["name_scores"] == [
        pytest.approx(scores[: 1 + len(others)], abs=1e-5)
        for scores, others in zip(given.name_scores.tolist(), given.alternatives, strict=True)
    ]


DETECT = """
import jax
traced = set()
jax.monitoring.register_event_duration_secs_listener(lambda event, _, **about: traced.add(about.get("fun_name")))
import opendet_jax
from opendet_jax.data.scene_drawing import draw_scene
image, _ = draw_scene(seed=98, split="val", index=0, size=128)
detector = opendet_jax.load("scenes_tiny")
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
found = detector.detect(image)
print(found.to_json())
print(sorted(traced & {"_first_half", "_second_half", "_names"}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="programs are kept on Linux alone")
def test_the_first_detect_of_a_later_process_traces_nothing(tmp_path):
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path)}
    seen = []
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", DETECT], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        seen.append(done.stdout.rstrip().rsplit("\n", 1))
    (first, traced), (second, nothing) = seen
    assert (traced, nothing) == ("['_first_half', '_names', '_second_half']", "[]")
    assert json.loads(first)
    assert first == second
