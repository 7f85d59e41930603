"""The Python on docs/python.md, as it stands there, with the model that comes along."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import supervision
from PIL import Image
from pycocotools.coco import COCO

import opendet_jax
from opendet_jax.data.scene_drawing import KINDS, draw_scene

PAGE = Path(__file__).parents[2] / "docs" / "python.md"
SIZE = 128  # pixels of a scene
FRAMES, STEP, LARGER = 14, 2, 4  # of the film; by how many pixels the camera moves, before they are made larger
PROGRAMS = ("a picture", "a video", "slices")


def programs() -> dict[str, str]:
    """One begins with each block that imports the package; the blocks after it go on with what it has made."""
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    found: list[str] = []
    for block in blocks:
        if "import opendet_jax\n" in block:
            found.append("")
        found[-1] += block
    return dict(zip(PROGRAMS, found, strict=True))


@pytest.fixture(scope="module")
def detector():
    return opendet_jax.load("scenes_tiny")


@pytest.fixture
def run(tmp_path, monkeypatch, detector):
    """Runs a program in an empty folder. All have one model, loaded and compiled once."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("opendet_jax.predict.detector.load", {"scenes_tiny": detector}.__getitem__)

    def execute(name):
        namespace: dict = {}
        exec(compile(programs()[name], str(PAGE), "exec"), namespace)
        return namespace

    return execute


def scenes(rows):
    """Scenes beside and under each other: the pixels, and each object's name and corners."""
    pixels, objects = [], []
    for row, indices in enumerate(rows):
        drawn = [draw_scene(seed=3, split="val", index=index, size=SIZE) for index in indices]
        pixels.append(np.concatenate([scene for scene, _ in drawn], axis=1))
        for column, (_, items) in enumerate(drawn):
            for item in items:
                x, y, width, height = np.add(item.box, (column * SIZE, row * SIZE, 0, 0))
                objects.append((KINDS[item.kind].name, np.array([x, y, x + width, y + height])))
    return np.concatenate(pixels), objects


def overlaps(box, boxes):
    """IoU of a box with each of several."""
    sides = np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2])
    common = np.maximum(sides, 0).prod(1)
    return common / (np.prod(box[2:] - box[:2]) + np.prod(boxes[:, 2:] - boxes[:, :2], 1) - common)


def test_a_picture(run, tmp_path, capsys):
    made = run("a picture")
    found = made["found"]
    assert len(found) >= 5
    assert capsys.readouterr().out.startswith(f"Detections({len(found)} objects\n")
    assert 0 < len(made["sure"]) < len(found)
    assert made["stars"].names == [name for name in found.names if "star" in name] != []
    with Image.open("annotated.png") as annotated:
        assert annotated.size == (512, 512)
    assert len(made["of_all"]) == 6
    assert made["of_all"][3].names == made["detector"].detect(made["image"]).names
    assert {*made["chosen"].names} <= {"red star", "yellow circle", "blue cross"}
    assert {*made["one"].names} <= {"red star"}

    entries = json.loads(Path("results.json").read_text())
    assert {entry["category_id"] for entry in entries} == {7, 12, -1}
    truth = COCO()
    truth.dataset = {
        "images": [{"id": 139}],
        "categories": [{"id": id, "name": name} for name, id in made["names"].items()],
        "annotations": [],
    }
    truth.createIndex()
    assert len(truth.loadRes("results.json").getAnnIds(catIds=[7, 12])) == 2

    lines = Path("labels/scene.txt").read_text().splitlines()
    named = [made["classes"][int(line.split()[0])] for line in lines]
    assert named == found.names
    assert re.findall(r"<name>(.*)</name>", Path("voc/scene.xml").read_text()) == found.names


def test_a_video_has_one_name_for_each_track(run):
    pixels, objects = scenes([(3, 8)])
    side = LARGER * SIZE
    with supervision.VideoSink("street.mp4", supervision.VideoInfo(width=side, height=side, fps=10.0)) as sink:
        for left in range(0, STEP * FRAMES, STEP):
            sink.write_frame(np.kron(pixels[:, left : left + SIZE, ::-1], np.ones((LARGER, LARGER, 1), np.uint8)))
    made = run("a video")

    seen = [(number, *row) for number, found in enumerate(made["frames"]) for row in zip(*columns(found), strict=True)]
    tracks = {track for _, track, _ in seen}
    assert tracks == set(made["names"])
    right = long = 0
    for name, box in objects:
        followed = [
            track
            for number, track, corners in seen
            if overlaps(LARGER * (box - STEP * number * np.array([1, 0, 1, 0])), corners[None])[0] > 0.6
        ]
        if len(followed) >= FRAMES // 2:
            long += 1
            assert len(set(followed)) == 1
            right += made["names"][followed[0]] == name
    assert long >= 4
    assert right >= 0.7 * long

    written = list(supervision.get_video_frames_generator("named.mp4"))
    assert [frame.shape for frame in written] == [(side, side, 3)] * FRAMES
    before = next(supervision.get_video_frames_generator("street.mp4", start=FRAMES - 1))
    assert (np.abs(written[-1].astype(int) - before).max(-1) > 60).sum() > 5000  # boxes and labels


def columns(found):
    return found.tracker_id.tolist(), found.xyxy


def test_slices_find_what_the_whole_picture_hides(run, detector):
    pixels, objects = scenes([(3, 4), (5, 6)])
    Image.fromarray(pixels).save("large.png")
    made = run("slices")

    def hit(boxes):
        return sum((overlaps(box, boxes) > 0.5).any() for _, box in objects)

    found = made["found"]
    assert hit(found.xyxy) >= 0.9 * len(objects)
    assert hit(detector.detect(pixels).boxes) < 0.7 * len(objects)
    assert len(found) < 1.4 * len(objects)
    for place, box in enumerate(found.xyxy):
        assert np.delete(overlaps(box, found.xyxy), place).max() <= 0.5
    assert made["names"] == found["class_name"].tolist()
    with Image.open("named.png") as named:
        assert named.size == (512, 512)
