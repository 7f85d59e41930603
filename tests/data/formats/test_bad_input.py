"""Pictures of every unpleasant kind in one data set: what training makes of them, from files and from shards."""

import numpy as np
import pytest
from absl import logging
from PIL import Image

from opendet_jax.config import DataConfig
from opendet_jax.data.datasets import read_annotations
from opendet_jax.data.examples import Examples
from opendet_jax.data.images import ImageError, open_record
from opendet_jax.data.plan import Mixture
from opendet_jax.data.prepared.write import Job, prepare
from tests.data.published import coco_json

RNG = np.random.default_rng(0)
GOOD = {"cmyk.jpg", "grey.png", "turned.jpg", "dot.png", "wide.jpg", "tall.png", "crowded.jpg", "alpha.png"}
BAD = {
    "cut.jpg": "cannot be decoded",
    "text.jpg": "is not an image",
    "gone.jpg": "no such image",
    "size.jpg": "is 30×20",
}
OBJECTS = 400
DATA = DataConfig(
    batch_size=4,
    max_objects=10,
    max_unreadable=1.0,
    buckets=((64, 96), (96, 64), (32, 640)),
    train_short_sides=(48, 64),
    max_long_side=600,
    crop_short_sides=(50,),
    crop_range=(20, 60),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("bad")
    noise = Image.fromarray(RNG.integers(0, 256, (60, 80, 3), dtype=np.uint8))
    turned = Image.Exif()
    turned[0x0112] = 6  # the file is 80×60, upright it is 60×80
    noise.convert("CMYK").save(path / "cmyk.jpg")
    noise.convert("L").save(path / "grey.png")
    noise.save(path / "turned.jpg", exif=turned)
    noise.resize((1, 1)).save(path / "dot.png")
    noise.resize((8000, 50)).save(path / "wide.jpg")
    noise.resize((50, 8000)).save(path / "tall.png")
    noise.save(path / "crowded.jpg")
    noise.convert("RGBA").save(path / "alpha.png")
    noise.save(path / "cut.jpg")
    (path / "cut.jpg").write_bytes((path / "cut.jpg").read_bytes()[:900])
    (path / "text.jpg").write_text("not an image")
    noise.resize((30, 20)).save(path / "size.jpg")
    sizes = {"turned.jpg": (60, 80), "dot.png": (1, 1), "wide.jpg": (8000, 50), "tall.png": (50, 8000)}
    images, annotations = [], []
    for i, name in enumerate(sorted([*GOOD, *BAD]), 1):
        width, height = sizes.get(name, (80, 60))
        images.append({"id": i, "file_name": name, "width": width, "height": height})
        for _ in range(OBJECTS if name == "crowded.jpg" else 1):
            annotations.append({"image_id": i, "category_id": 1, "bbox": [-1, -1, width + 2, height + 2]})
    images.append({"id": 99, "file_name": "alpha.png", "width": 80, "height": 60})  # without an object
    coco_json(path / "bad.json", images, annotations, [{"id": 1, "name": "a long name " * 25}])
    return path


def test_training_skips_counts_and_reports(folder, monkeypatch):
    warned = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: warned.append(text % values))
    dataset, problems = read_annotations(folder / "bad.json", folder)
    assert problems.counts["box clipped to its image"] == len(GOOD | BAD.keys()) - 1 + OBJECTS
    assert "name of more than 200 characters, kept" in problems.counts
    examples = Examples(Mixture.of((dataset, 1.0)), DATA, seed=0)
    seen = set()
    for step in range(12):
        batch = examples[step]
        seen |= {path.name for path in batch.paths}
        inside = batch.boxes[batch.valid]
        assert ((inside >= 0) & (inside <= 1)).all()
        assert batch.valid.any(axis=1).all()
        assert batch.valid.sum(axis=1).max() <= DATA.max_objects
    assert seen == GOOD
    assert "1 images have more than data.max_objects = 10 objects" in warned[0]
    assert len(warned) == 1 + len(BAD)
    for name, reason in BAD.items():
        assert sum(f"{name}: {reason}" in line for line in warned) == 1, name


def test_preparing_leaves_the_same_images_out(folder, tmp_path):
    summary = prepare(Job("coco_json", folder / "bad.json", folder, tmp_path / "out"), progress=False)
    reasons = " ".join(entry["reason"] for entry in summary["left_out"])
    assert len(summary["left_out"]) == len(BAD)
    assert all(f"{name}: {reason}" in reasons for name, reason in BAD.items())
    dataset, _ = read_annotations(folder / "bad.json", folder)
    prepared, _ = read_annotations(tmp_path / "out", "")
    assert len(prepared) == len(GOOD) + 1
    assert max(len(record.boxes) for record in prepared.records) == OBJECTS
    assert [len(record.boxes) for record in prepared.records if record.image_id == 99] == [0]
    originals = {record.image_id: record for record in dataset.records}
    for record in prepared.records:
        original = open_record(originals[record.image_id])
        np.testing.assert_array_equal(np.asarray(open_record(record)), np.asarray(original))
    for record in dataset.records:
        if record.path.name in BAD:
            with pytest.raises(ImageError, match=BAD[record.path.name]):
                open_record(record)
