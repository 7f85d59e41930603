"""`python -m opendet_jax.evaluate` from files to files."""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from opendet_jax.evaluate.__main__ import main
from opendet_jax.evaluate.evaluator import ImageScore
from opendet_jax.evaluate.pictures import best_and_worst
from tests.evaluate.made_up import detections_like, metrics, random_truth
from tests.evaluate.packages import run_coco, run_fixed, run_lvis

PICTURES = {"precision_recall.png", "ap_by_frequency.png", "names.png"}
EXAMPLES = {"best_images.png", "worst_images.png"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Truths in LVIS's and in COCO's form, detections of both, named, and photographs."""
    path = tmp_path_factory.mktemp("scored")
    rng = np.random.default_rng(23)
    truth = random_truth(rng, images=7, federated=True)
    (path / "images").mkdir()
    for image in truth["images"]:
        Image.fromarray(rng.integers(0, 256, (480, 640, 3), dtype=np.uint8)).save(path / "images" / image["file_name"])
    (path / "lvis.json").write_text(json.dumps(truth))
    found = detections_like(truth, rng, 0.3, 0.15, 10)
    for detection in found:
        detection["names"] = [f"class {(detection['category_id'] - 2) // 3}", "$other$ name"][:: rng.choice([1, -1])]
    (path / "p.json").write_text(json.dumps(found))
    categories = [{"id": c["id"], "name": c["name"]} for c in truth["categories"]]
    fields = ("id", "file_name", "width", "height")
    images = [{field: image[field] for field in fields} for image in truth["images"]]
    (path / "coco.json").write_text(json.dumps({**truth, "images": images, "categories": categories}))
    return path


def score(folder, out, truth, *arguments):
    main([f"--annotations={folder}/{truth}", f"--predictions={folder}/p.json", f"--out={out}", *arguments])
    return json.loads((out / "metrics.json").read_text())


def load(path):
    return json.loads(path.read_text())


def test_lvis(folder, tmp_path, capsys):
    numbers = score(folder, tmp_path / "out", "lvis.json", f"--images={folder}/images")
    found = load(folder / "p.json")
    for key, value in run_lvis(folder / "lvis.json", found).items():
        assert numbers[key] == (None if value is None else pytest.approx(value, abs=1e-9)), key
    for key, value in run_fixed(folder / "lvis.json", found).items():
        assert numbers[f"fixed_{key}"] == (None if value is None else pytest.approx(value, abs=1e-9)), key
    expected = {"protocol": "lvis", "images": 7, "detections": len(found), "predictions": f"{folder}/p.json"}
    assert expected.items() <= numbers.items()
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"metrics.json", "classes.csv", "names.csv"} | PICTURES | EXAMPLES
    for name in PICTURES | EXAMPLES:
        with Image.open(tmp_path / "out" / name) as picture:
            assert picture.width > 700
    printed = capsys.readouterr().out
    assert f"AP {100 * numbers['AP']:.1f}  " in printed
    assert f"synonym_accuracy {100 * numbers['synonym_accuracy']:.1f}" in printed


def test_classes_and_names(folder, tmp_path):
    numbers = score(folder, tmp_path, "lvis.json")
    with (tmp_path / "classes.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["name"] for line in lines] == [f"class {i}" for i in range(5)]
    assert [line["frequency"] for line in lines] == ["r", "c", "f", "r", "c"]
    for key in ("AP", "AP50", "AR", "fixed_AP"):
        values = [float(line[key]) for line in lines if line[key]]
        assert np.mean(values) == pytest.approx(numbers[key]), key
    found = sum(int(line["found"]) for line in lines)
    assert sum(int(line["named"]) for line in lines) / found == pytest.approx(numbers["naming_accuracy"])
    with (tmp_path / "names.csv").open() as file:
        names = list(csv.DictReader(file))
    assert sum(int(line["times"]) for line in names) == found
    right = sum(int(line["times"]) for line in names if line["class"] == line["called"])
    assert right / found == pytest.approx(numbers["exact_name_accuracy"])
    assert not EXAMPLES & {path.name for path in tmp_path.iterdir()}


def test_fixed_ap_has_the_same_numbers_and_its_own_pictures(folder, tmp_path):
    lvis = score(folder, tmp_path / "a", "lvis.json")
    fixed = score(folder, tmp_path / "b", "lvis.json", "--protocol=lvis_fixed")
    assert {**lvis, "protocol": "lvis_fixed"} == fixed
    pictures = [(tmp_path / out / "precision_recall.png").read_bytes() for out in "ab"]
    assert pictures[0] != pictures[1]


def test_coco(folder, tmp_path):
    numbers = score(folder, tmp_path, "coco.json", "--protocol=coco", f"--images={folder}/images")
    for key, value in run_coco(folder / "coco.json", load(folder / "p.json")).items():
        assert numbers[key] == (None if value is None else pytest.approx(value, abs=1e-9)), key
    assert "fixed_AP" not in numbers
    assert {path.name for path in tmp_path.iterdir()} >= PICTURES | EXAMPLES
    beside = score(folder, tmp_path, "coco.json")
    assert beside["coco_AP"] == numbers["AP"]
    assert beside["APr"] is None


def test_no_detections_score_nothing_and_say_so(folder, tmp_path, capsys):
    (tmp_path / "none.json").write_text("[]")
    arguments = (f"--annotations={folder}/lvis.json", f"--predictions={tmp_path}/none.json")
    main([*arguments, f"--images={folder}/images"])
    assert "none.json holds no detection: every score is 0" in capsys.readouterr().err
    numbers = load(tmp_path / "none_scores/metrics.json")
    assert numbers["AP"] == numbers["fixed_AP"] == numbers["agnostic_AP"] == numbers["recall50"] == 0
    assert numbers["naming_accuracy"] is None
    assert {path.name for path in (tmp_path / "none_scores").iterdir()} >= PICTURES | EXAMPLES


def test_the_command_of_the_program_itself(folder, tmp_path):
    """As a user runs it: one line for what is wrong, and nothing written."""
    (tmp_path / "cut.json").write_text((folder / "p.json").read_text()[:1000])
    (tmp_path / "nan.json").write_text((folder / "p.json").read_text().replace('"score": ', '"score": NaN, "old": ', 1))
    for name, message in (
        ("cut", "is not json: [5], at character 957: the file ends"),
        ("nan", "record 0: score nan is not a number"),
    ):
        command = [sys.executable, "-m", "opendet_jax.evaluate", "--annotations", f"{folder}/lvis.json"]
        command += ["--predictions", f"{tmp_path}/{name}.json", "--out", f"{tmp_path}/out"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 1
        assert done.stderr.startswith(f"error: {tmp_path}/{name}.json: {message}")
        assert len(done.stderr.splitlines()) == 1
        assert not (tmp_path / "out").exists()


def test_an_image_that_is_missing_ends_it_before_anything_is_written(folder, tmp_path):
    with pytest.raises(SystemExit, match=r"error: .*\.jpg: no such image"):
        score(folder, tmp_path / "out", "lvis.json", f"--images={tmp_path}")
    assert not (tmp_path / "out").exists()


def test_best_and_worst():
    scores = [ImageScore(i, share, objects) for i, (share, objects) in enumerate([(0, 1), (1, 1), (0, 3), (1, 2)])]
    best, worst = best_and_worst(scores)
    assert [score.image_id for score in best] == [3, 1]
    assert [score.image_id for score in worst] == [2, 0]
    assert best_and_worst(scores[:1]) == (scores[:1], [])
    assert best_and_worst([]) == ([], [])


def test_numbers_do_not_depend_on_the_order_of_images(folder, tmp_path):
    """The file's order counts only within an image, as long as no limit is reached."""
    truth, found = load(folder / "lvis.json"), load(folder / "p.json")
    order = sorted(found, key=lambda detection: -detection["image_id"])
    assert metrics(truth, order) == metrics(truth, found)


PARTIAL = "5 of 7 images have no detection in "


def test_images_without_a_detection_are_counted_and_said(folder, tmp_path, capsys):
    """Their objects are missed, unless only the others are asked for."""
    truth, found = load(folder / "lvis.json"), load(folder / "p.json")
    kept = {image["id"] for image in truth["images"][:2]}
    (tmp_path / "p.json").write_text(json.dumps([d for d in found if d["image_id"] in kept]))
    arguments = [f"--annotations={folder}/lvis.json", f"--predictions={tmp_path}/p.json"]
    main([*arguments, f"--out={tmp_path}/all"])
    missed = sum(a["image_id"] not in kept and not a["iscrowd"] for a in truth["annotations"])
    said = f"{tmp_path}/p.json: their {missed} objects are missed (--only_predicted leaves such images out)"
    assert f"warning: {PARTIAL}{said}" in capsys.readouterr().err
    every = load(tmp_path / "all/metrics.json")
    assert (every["images"], every["images_without_detection"]) == (7, 5)
    main([*arguments, f"--out={tmp_path}/part", "--only_predicted", f"--images={folder}/images"])
    printed = capsys.readouterr()
    assert "2 images (5 without a detection left out), " in printed.out
    assert "warning" not in printed.err
    part = load(tmp_path / "part/metrics.json")
    assert (part["images"], part["images_left_out"]) == (2, 5)
    assert every["AP"] < part["AP"]
    truth["images"] = [image for image in truth["images"] if image["id"] in kept]
    truth["annotations"] = [a for a in truth["annotations"] if a["image_id"] in kept]
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    for key, value in run_lvis(tmp_path / "truth.json", load(tmp_path / "p.json")).items():
        assert part[key] == (None if value is None else pytest.approx(value, abs=1e-9)), key
    main([f"--annotations={tmp_path}/truth.json", *arguments[1:], f"--out={tmp_path}/whole"])
    assert "warning" not in capsys.readouterr().err
    whole = load(tmp_path / "whole/metrics.json")
    assert not {"images_without_detection", "images_left_out"} & whole.keys()
    assert whole["AP"] == part["AP"]


def test_only_predicted_images_of_no_detection_are_none(folder, tmp_path):
    (tmp_path / "none.json").write_text("[]")
    arguments = [f"--annotations={folder}/lvis.json", f"--predictions={tmp_path}/none.json", "--only_predicted"]
    with pytest.raises(SystemExit, match=r"none\.json: holds no detection, and --only_predicted leaves no image"):
        main([*arguments, f"--out={tmp_path}/out"])
    assert not (tmp_path / "out").exists()


def test_what_is_unusable_in_the_truth_is_said(folder, tmp_path, capsys):
    truth = load(folder / "lvis.json")
    for annotation, area in zip(truth["annotations"], ("900", float("nan"), -1, None), strict=False):
        annotation["area"] = area
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    main([f"--annotations={tmp_path}/truth.json", f"--predictions={folder}/p.json", f"--out={tmp_path}/out"])
    assert "truth.json: 3 × area that is none, the box's taken (annotation 1 of image " in capsys.readouterr().err
    for annotation in truth["annotations"][:4]:
        annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
    (tmp_path / "right.json").write_text(json.dumps(truth))
    main([f"--annotations={tmp_path}/right.json", f"--predictions={folder}/p.json", f"--out={tmp_path}/right"])
    ours, right = (load(tmp_path / name / "metrics.json") for name in ("out", "right"))
    assert {**ours, "annotations": ""} == {**right, "annotations": ""}


@pytest.mark.parametrize(
    ("at", "message", "files"),
    [
        ("read_truth", "stopped: nothing is written", set()),
        ("EdgeEvaluator.finish", "stopped: nothing is written", set()),
        ("_draw", r"stopped: all numbers are in .*out, not all pictures", {"metrics.json", "classes.csv", "names.csv"}),
    ],
)
def test_ctrl_c(folder, tmp_path, at, message, files, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    (tmp_path / "out").mkdir()
    monkeypatch.setattr(f"opendet_jax.evaluate.report.{at}", interrupt)
    with pytest.raises(SystemExit, match=message):
        score(folder, tmp_path / "out", "lvis.json")
    assert {path.name for path in (tmp_path / "out").iterdir()} == files


def test_frequencies_and_repeated_entries_that_are_passed_over_are_said(folder, tmp_path, capsys):
    truth = load(folder / "lvis.json")
    truth["categories"][0]["frequency"] = "rare"
    truth["images"].append(truth["images"][0])
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    main([f"--annotations={tmp_path}/truth.json", f"--predictions={folder}/p.json", f"--out={tmp_path}/out"])
    said = capsys.readouterr().err
    assert "1 × frequency is not r, c, f or u, category kept without" in said
    assert "1 × repeated image" in said


def test_half_a_character_in_a_name(folder, tmp_path):
    """json can hold it, and UTF-8 cannot."""
    found = load(folder / "p.json")
    found[0]["names"] = ["caf\ud83d", "other"]
    (tmp_path / "p.json").write_text(json.dumps(found))
    main([f"--annotations={folder}/lvis.json", f"--predictions={tmp_path}/p.json", f"--out={tmp_path}/out"])
    assert {"metrics.json", "classes.csv", "names.csv"} <= {path.name for path in (tmp_path / "out").iterdir()}


def test_pictures_of_an_evaluation_before_go(folder, tmp_path):
    score(folder, tmp_path, "lvis.json", f"--images={folder}/images")
    assert {path.name for path in tmp_path.iterdir()} >= EXAMPLES
    score(folder, tmp_path, "lvis.json")
    assert not EXAMPLES & {path.name for path in tmp_path.iterdir()}


def test_its_output_is_looked_at_first(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("opendet_jax.evaluate.report.read_truth", lambda *_: pytest.fail("the truth was read"))
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=r"error: .*file: cannot be written to"):
        score(folder, tmp_path / "file", "lvis.json")
