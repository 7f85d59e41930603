"""True boxes beyond the picture's edge: pycocotools' numbers, and beside them those with clipped truth."""

import json

import numpy as np
import pytest
from PIL import Image

from opendet_jax.checkpoints.same_config import in_training
from opendet_jax.config import Config, DataConfig, EvalConfig
from opendet_jax.data.formats.json_source import read_json
from opendet_jax.evaluate.__main__ import main
from opendet_jax.evaluate.evaluator import EdgeEvaluator, Edges, clip_truth, edges_said
from opendet_jax.evaluate.loop import evaluate
from opendet_jax.evaluate.truth import lvis_truth
from opendet_jax.inference import Found, Inference
from tests.evaluate.made_up import as_detections, detections_like, metrics, random_truth
from tests.evaluate.packages import run_coco

INSIDE, BEYOND, OUTSIDE = [10, 10, 20, 20], [60, 60, 80, 80], [150, 150, 30, 30]
FOUND = [
    {"image_id": 1, "category_id": 1, "bbox": [60, 60, 40, 40], "score": 0.9},
    {"image_id": 1, "category_id": 1, "bbox": INSIDE, "score": 0.8},
]
KEYS = {"boxes_beyond_picture", "boxes_outside_picture", "clipped_AP", "clipped_fixed_AP", "clipped_coco_AP"}


def write(folder, *boxes, **fields):
    content = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": 100, "height": 100} for i in (1, 2)],
        "annotations": [
            {"id": n, "image_id": 1, "category_id": 1, "bbox": box, "area": box[2] * box[3], "iscrowd": 0, **fields}
            for n, box in enumerate(boxes, 1)
        ],
        "categories": [{"id": 1, "name": "cat"}],
    }
    path = folder / "truth.json"
    path.write_text(json.dumps(content))
    return path


def load(folder, *boxes, **fields):
    dataset, _ = read_json(write(folder, *boxes, **fields), folder)
    return dataset, lvis_truth(dataset)


def run(dataset, content, clipped):
    evaluator = EdgeEvaluator(content, dataset, clipped=clipped)
    evaluator.add(1, as_detections(FOUND))
    evaluation, edges = evaluator.finish()
    return evaluation.metrics | edges


def test_pycocotools_numbers_and_beside_them_those_of_clipped_truth(tmp_path):
    numbers = run(*load(tmp_path, BEYOND, INSIDE, OUTSIDE), clipped=False)
    packages = run_coco(tmp_path / "truth.json", FOUND)
    assert numbers["AP"] == numbers["coco_AP"] == pytest.approx(packages["AP"]) == pytest.approx(0.5 * 34 / 101)
    assert (numbers["boxes_beyond_picture"], numbers["boxes_outside_picture"]) == (2, 1)
    assert numbers["clipped_AP"] == numbers["clipped_fixed_AP"] == numbers["clipped_coco_AP"] == pytest.approx(1)


def test_evaluation_on_clipped_truth(tmp_path):
    numbers = run(*load(tmp_path, BEYOND, INSIDE, OUTSIDE), clipped=True)
    assert numbers["AP"] == numbers["recall50"] == pytest.approx(1)
    assert numbers.keys() & KEYS == {"boxes_beyond_picture", "boxes_outside_picture"}
    assert numbers["clip_truth"] is True


def test_nothing_is_new_where_no_box_is_concerned(tmp_path):
    edge = [99.1, 0, 0.9004, 100]  # to within rounding
    dataset, content = load(tmp_path, INSIDE, [0, 0, 100, 100], edge, [100, 5, 0, 5])
    numbers = run(dataset, content, clipped=False)
    assert not KEYS & numbers.keys()
    assert "clip_truth" not in numbers
    assert edges_said(numbers) == []
    assert clip_truth(content, dataset) == (content, Edges(0, 0))
    assert run(dataset, content, clipped=True) == numbers | {"clip_truth": True}


@pytest.mark.parametrize(
    ("box", "clipped"),
    [
        ([-5, -6, 10, 10], [0, 0, 5, 4]),
        ([95, 97.5, 10, 10], [95, 97.5, 5, 2.5]),
        ([-1e300, -1, 2e300, 200], [0, 0, 100, 100]),
        ([-10, 0, 10, 10], None),
        ([0, 100, 10, 10], None),
        ([120, 0, 0, 10], None),
        ([10**300, 5, 5, 5], None),
    ],
)
def test_boxes_by_hand(tmp_path, box, clipped):
    dataset, content = load(tmp_path, box, area=20)
    inside, edges = clip_truth(content, dataset)
    assert [annotation["bbox"] for annotation in inside["annotations"]] == ([clipped] if clipped else [])
    assert edges == Edges(1, clipped is None)
    if clipped:
        assert inside["annotations"][0]["area"] == min(20, clipped[2] * clipped[3])


@pytest.mark.parametrize("protocol", ["lvis", "coco"])
def test_clipped_numbers_are_those_of_a_file_of_clipped_boxes(tmp_path, protocol):
    rng = np.random.default_rng(3)
    truth = random_truth(rng, images=6, crowds=0.1)
    found = detections_like(truth, rng, 0.2, 0.2, 10)
    for image in truth["images"]:
        image |= {"width": 400, "height": 300}  # smaller than what they were made for
    for category in truth["categories"]:
        del category["frequency"]
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    dataset, _ = read_json(tmp_path / "truth.json", tmp_path)
    content = lvis_truth(dataset)
    evaluator = EdgeEvaluator(content, dataset, protocol)
    for image_id in {detection["image_id"] for detection in found}:
        evaluator.add(image_id, as_detections([d for d in found if d["image_id"] == image_id]))
    evaluation, edges = evaluator.finish()
    assert edges["boxes_beyond_picture"] > edges["boxes_outside_picture"] > 0
    by_hand = {**content, "annotations": []}
    for annotation in content["annotations"]:
        x, y, w, h = annotation["bbox"]
        x1, y1 = min(x + w, 400), min(y + h, 300)
        if x < 400 and y < 300:
            box = [x, y, x1 - x, y1 - y]
            area = min(annotation["area"], box[2] * box[3])
            by_hand["annotations"].append({**annotation, "bbox": box, "area": area})
    expected = metrics(by_hand, found, protocol)
    assert evaluation.metrics == pytest.approx(metrics(content, found, protocol))
    for key in edges.keys() - {"boxes_beyond_picture", "boxes_outside_picture"}:
        assert edges[key] == pytest.approx(expected[key.removeprefix("clipped_")], abs=1e-12)
        assert edges[key] != evaluation.metrics[key.removeprefix("clipped_")]
    assert "clipped_AP" in edges


def test_the_command_says_it(tmp_path, capsys):
    annotations = write(tmp_path, BEYOND, INSIDE, OUTSIDE)
    (tmp_path / "p.json").write_text(json.dumps(FOUND))
    arguments = [f"--annotations={annotations}", f"--predictions={tmp_path}/p.json", "--protocol=coco"]
    main([*arguments, f"--out={tmp_path}/as_written"])
    concerned = "true boxes beyond their picture: 2, of these 1 wholly outside"
    assert f"{concerned}; AP with them clipped, as in training: 100.0 (clip_truth)" in capsys.readouterr().out
    as_written = json.loads((tmp_path / "as_written/metrics.json").read_text())
    assert (as_written["AP"], as_written["clipped_AP"]) == pytest.approx((0.5 * 34 / 101, 1))
    main([*arguments, f"--out={tmp_path}/clipped", "--clip_truth"])
    assert f"{concerned}; clipped, those outside passed over" in capsys.readouterr().out
    clipped = json.loads((tmp_path / "clipped/metrics.json").read_text())
    assert clipped["AP"] == pytest.approx(1)
    assert clipped["clip_truth"] is True


class Fixed(Inference):
    """Finds FOUND in the first image, and nothing in the second."""

    def __init__(self):
        pass

    def __call__(self, images, sizes, selection, given=None):
        x, y, w, h = np.array([detection["bbox"] for detection in FOUND], np.float32).T
        boxes, scores = np.stack([x, y, x + w, y + h], axis=1), np.array([0.9, 0.8], np.float32)
        everything = Found(boxes, scores, [["cat"]] * 2, np.zeros((2, 1), np.float32))
        nothing = Found(boxes[:0], scores[:0], [], np.zeros((0, 1), np.float32))
        return [everything, nothing]


@pytest.mark.parametrize("clip", [False, True])
def test_the_evaluation_of_a_model(tmp_path, clip, capsys):
    dataset, _ = load(tmp_path, BEYOND, INSIDE, OUTSIDE)
    for i in (1, 2):
        Image.new("RGB", (100, 100)).save(tmp_path / f"{i}.jpg")
    config = Config(
        data=DataConfig(name="toy", eval_short_side=32, buckets=((32, 32),)),
        eval=EvalConfig(batch_size=2, pictures=0, clip_truth=clip),
    )
    numbers = evaluate(Fixed(), dataset, config, tmp_path, step=0)
    assert numbers["AP"] == pytest.approx(1 if clip else 0.5 * 34 / 101)
    assert numbers.get("clipped_AP") == (None if clip else pytest.approx(1))
    assert numbers.get("clip_truth", False) is clip
    assert "true boxes beyond their picture: 2, of these 1 wholly outside" in capsys.readouterr().out
    assert json.loads((tmp_path / "eval/toy/metrics.json").read_text()) == numbers


def test_a_run_may_change_it():
    assert not in_training("eval.clip_truth")
    assert EvalConfig().clip_truth is False  # as before there was the field
