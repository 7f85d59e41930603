"""Any number of devices gives the same predictions, and what fills batches up is in none of them."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests.evaluate.on_devices import DEVICES

IMAGES = 7  # in batches of 3: the last has two fillers, and 2 and 4 devices add copies


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """For each number of devices (predictions, metrics, the analysis of alignment)."""
    folder = tmp_path_factory.mktemp("devices")
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for i in range(IMAGES):
        pixels = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        images.append({"id": 10 + i, "file_name": f"{i}.png", "width": 64, "height": 64})
        for _ in range(i % 3):
            entry = {"id": len(annotations), "image_id": 10 + i, "category_id": i % 2}
            annotations.append({**entry, "bbox": rng.uniform(1, 30, 4).tolist()})
    categories = [{"id": 0, "name": "cat"}, {"id": 1, "name": "dog"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "toy.json").write_text(json.dumps(content))
    command = [sys.executable, "-m", "tests.evaluate.on_devices", str(folder / "toy.json"), str(folder)]
    # Optimised little: the model takes longer to compile than to run.
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"}
    done = subprocess.run(
        command, env={**os.environ, **flags, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr

    found = {}
    for count in DEVICES:
        evaluation = folder / str(count) / "eval" / "toy"
        predictions, metrics = (
            json.loads((evaluation / f"{name}.json").read_text()) for name in ("predictions", "metrics")
        )
        found[count] = predictions, metrics, np.load(folder / str(count) / "alignment.npy")
    return found


@pytest.mark.parametrize("count", DEVICES[1:])
def test_predictions_are_those_of_one_device(results, count):
    want, got = results[1][0], results[count][0]
    for exact in ("image_id", "category_id", "names"):
        assert [entry[exact] for entry in got] == [entry[exact] for entry in want]
    for key, atol in (("score", 1e-6), ("bbox", 1.1e-3), ("name_scores", 2e-5)):  # boxes and names are rounded
        np.testing.assert_allclose([entry[key] for entry in got], [entry[key] for entry in want], rtol=0, atol=atol)


@pytest.mark.parametrize("count", DEVICES[1:])
def test_metrics_are_those_of_one_device(results, count):
    assert results[count][1] == pytest.approx(results[1][1], abs=1e-6)


@pytest.mark.parametrize("count", DEVICES[1:])
def test_alignment_is_that_of_one_device(results, count):
    assert results[1][2].shape == (3, 7)
    np.testing.assert_allclose(results[count][2], results[1][2], atol=1e-6)


def test_what_fills_batches_up_never_enters(results):
    for predictions, metrics, _ in results.values():
        assert {entry["image_id"] for entry in predictions} == set(range(10, 10 + IMAGES))
        assert (metrics["images"], metrics["detections"]) == (IMAGES, len(predictions))
        assert {entry["category_id"] for entry in predictions} == {0, -1}
        assert len({(entry["image_id"], *entry["bbox"]) for entry in predictions}) == len(predictions)
