"""The evaluation loop on photographs made up here, with detections that are made up too."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from opendet_jax import errors
from opendet_jax.config import Config, DataConfig, EvalConfig, PredictConfig
from opendet_jax.data.formats.json_source import read_json
from opendet_jax.data.pipeline import evaluation_batches
from opendet_jax.errors import InputError
from opendet_jax.evaluate.loop import evaluate, table
from opendet_jax.evaluate.report import score_file
from opendet_jax.inference import Found, Inference

CONFIG = Config(
    data=DataConfig(name="toy", eval_short_side=32, max_long_side=64, buckets=((32, 64), (64, 32))),
    eval=EvalConfig(batch_size=2, pictures=3),
    predict=PredictConfig(min_score=0.3),
)
NAMES = {1: "cat", 2: "bus_(vehicle)", 3: "red ring", 4: "dog"}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Five pictures, tall and wide; image i shows class 1 + i % 3 twice."""
    folder = tmp_path_factory.mktemp("toy")
    images, annotations = [], []
    for i in range(5):
        width, height = (64, 32) if i % 2 else (32, 64)
        Image.new("RGB", (width, height), (40 * i, 90, 200)).save(folder / f"{i}.png")
        images.append(
            {
                "id": 10 + i,
                "file_name": f"{i}.png",
                "width": width,
                "height": height,
                "neg_category_ids": [1, 2, 3, 4],
                "not_exhaustive_category_ids": [],
            }
        )
        for x in (2, 12):
            bbox = [x, 5 + i, 9.5, 20]
            annotation = {"id": len(annotations), "image_id": 10 + i, "category_id": 1 + i % 3, "bbox": bbox}
            annotations.append({**annotation, "area": 190.0})
    categories = [{"id": i, "name": name, "frequency": "rcuf"[i - 1]} for i, name in NAMES.items()]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "toy.json").write_text(json.dumps(content))
    return read_json(folder / "toy.json", folder)[0]


class Knowing(Inference):
    """Knows the truth, and spoils it by `spoil`; batches come in the order of `evaluation_batches`."""

    def __init__(self, dataset, spoil):
        self.records = {record.image_id: record for record in dataset.records}
        batches = evaluation_batches(dataset, CONFIG.data, CONFIG.eval.batch_size)
        self.ids = [batch.image_ids[: batch.real].tolist() for batch in batches]
        self.spoil = spoil
        self.sizes = []

    def __call__(self, images, sizes, selection, given=None):
        assert (selection.max_detections, selection.nms_iou, selection.nms_above) == (900, 0.9, 300)
        assert len(images.pixels) == CONFIG.eval.batch_size
        self.sizes += sizes
        ids = self.ids.pop(0)
        assert len(ids) == len(sizes)
        return [self.spoil(self.found(self.records[i])) for i in ids]

    @staticmethod
    def found(record):
        names = [[names[0].upper(), "other"] for names in record.names]
        n = len(names)
        scores = np.linspace(0.9, 0.5, n).astype(np.float32)
        return Found(record.boxes, scores, names, np.zeros((n, 2), np.float32))


def nothing(found):
    return Found(found.boxes[:0], found.scores[:0], [], found.name_scores[:0])


def test_perfect_detections(dataset, tmp_path, capsys):
    inference = Knowing(dataset, lambda found: found)
    metrics = evaluate(inference, dataset, CONFIG, tmp_path, step=7)
    assert inference.ids == []
    assert sorted(inference.sizes) == [(32, 64)] * 2 + [(64, 32)] * 3
    for key in ("AP", "AP50", "APr", "APc", "APu", "APs", "fixed_AP", "agnostic_AP", "recall50", "naming_accuracy"):
        assert metrics[key] == pytest.approx(1, abs=1e-6), key
    assert metrics["APf"] is metrics["APl"] is None
    expected = {
        "name_mapping": "exact",
        "names": "generated",
        "dataset": "toy",
        "step": 7,
        "images": 5,
        "detections": 10,
    }
    assert expected.items() <= metrics.items()
    folder = tmp_path / "eval/toy"
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    predictions = json.loads((folder / "predictions.json").read_text())
    assert len(predictions) == 10
    assert {p["image_id"] for p in predictions} == {10, 11, 12, 13, 14}
    assert predictions[0].keys() == {"image_id", "category_id", "bbox", "score", "names", "name_scores"}
    with Image.open(folder / "pictures.png") as picture:
        assert picture.width > 900
    assert sorted(path.name for path in folder.iterdir()) == ["metrics.json", "pictures.png", "predictions.json"]
    printed = capsys.readouterr().out
    assert printed == table(metrics) + "\n"
    assert "APr 100.0" in printed
    assert "APf –" in printed


def test_negative_image_ids(dataset, tmp_path):
    """Hashes as ids, say; −1 among them, which is also that of what fills a batch up."""
    content = json.loads(dataset.annotations.read_text())
    for entry, field in [(i, "id") for i in content["images"]] + [(a, "image_id") for a in content["annotations"]]:
        entry[field] = 11 - entry[field]
    (tmp_path / "toy.json").write_text(json.dumps(content))
    negative = read_json(tmp_path / "toy.json", dataset.annotations.parent)[0]
    assert {record.image_id for record in negative.records} == {1, 0, -1, -2, -3}
    found = evaluate(Knowing(negative, lambda found: found), negative, CONFIG, tmp_path, step=7)
    same = ("AP", "detections", "recall50")
    wanted = evaluate(Knowing(dataset, lambda found: found), dataset, CONFIG, tmp_path / "other", step=7)
    assert {key: found[key] for key in same} == {key: wanted[key] for key in same}


@pytest.mark.parametrize("by", ["language", "alignment"])
def test_given_names_are_those_of_the_classes(dataset, tmp_path, capsys, by):
    limits = replace(CONFIG.eval, names="given", given_by=by)
    t5 = replace(CONFIG.model.t5, vocab_size=384)
    data = replace(CONFIG.data, tokenizer="byt5", text_embeddings="hashed")
    config = replace(CONFIG, eval=limits, data=data, model=replace(CONFIG.model, t5=t5))
    asked = []

    class Asked(Knowing):
        def __call__(self, images, sizes, selection, given=None):
            asked.append(given.names)
            found = super().__call__(images, sizes, selection)
            return [replace(one, names=[names[:1] for names in one.names]) for one in found]  # as of fewer than beams

    metrics = evaluate(Asked(dataset, lambda found: found), dataset, config, tmp_path, step=7)
    assert {*asked} == {tuple(category.name for category in dataset.categories)}
    assert metrics["names"] == f"given, chosen by {by}"
    assert f"names to classes: exact, given, chosen by {by}" in capsys.readouterr().out
    entry = json.loads((tmp_path / f"eval/toy_given_by_{by}/predictions.json").read_text())[0]
    assert len(entry["names"]) == len(entry["name_scores"]) == 1


def test_nothing_found(dataset, tmp_path):
    metrics = evaluate(Knowing(dataset, nothing), dataset, CONFIG, tmp_path, step=0)
    assert metrics["AP"] == metrics["agnostic_AP"] == metrics["recall50"] == metrics["detections"] == 0
    assert metrics["naming_accuracy"] is None
    text = (tmp_path / "eval/toy/metrics.json").read_text()
    assert "NaN" not in text
    assert not any(isinstance(value, float) and math.isnan(value) for value in metrics.values())


def test_wrong_names_cost_ap_but_not_localisation(dataset, tmp_path):
    def rename(found):
        return replace(found, names=[["nonsense", "cat"], *found.names[1:]])

    metrics = evaluate(Knowing(dataset, rename), dataset, CONFIG, tmp_path, step=0)
    assert metrics["agnostic_AP"] == pytest.approx(1, abs=1e-6)
    assert metrics["naming_accuracy"] == 0.5
    assert 0.4 < metrics["AP"] < 0.6
    predictions = json.loads((tmp_path / "eval/toy/predictions.json").read_text())
    assert sum(p["category_id"] == -1 for p in predictions) == 5


def test_its_file_scores_the_same(dataset, tmp_path):
    """By `python -m opendet_jax.evaluate`, where no image has more detections than the file keeps."""

    def spoil(found):
        boxes = found.boxes + np.array([1.234567, 0, 2, 0.5], np.float32)
        return replace(found, boxes=boxes, names=[["nonsense", "cat"], *found.names[1:]])

    metrics = evaluate(Knowing(dataset, spoil), dataset, CONFIG, tmp_path, step=0)
    folder = tmp_path / "eval/toy"
    scored = score_file(dataset.annotations, folder / "predictions.json", "lvis", folder / "scores")
    assert 0 < metrics["AP"] < 1
    shared = metrics.keys() & scored.keys()
    assert {"AP", "fixed_AP", "agnostic_AP", "synonym_accuracy", "detections"} <= shared
    assert {key: metrics[key] for key in shared} == {key: scored[key] for key in shared}


def test_pictures_of_an_evaluation_before_go(dataset, tmp_path):
    evaluate(Knowing(dataset, lambda found: found), dataset, CONFIG, tmp_path, step=7)
    assert (tmp_path / "eval/toy/pictures.png").exists()
    fewer = replace(CONFIG, eval=replace(CONFIG.eval, pictures=0))
    evaluate(Knowing(dataset, lambda found: found), dataset, fewer, tmp_path, step=7)
    assert {path.name for path in (tmp_path / "eval/toy").iterdir()} == {"metrics.json", "predictions.json"}


def test_no_pictures(dataset, tmp_path):
    config = replace(CONFIG, eval=replace(CONFIG.eval, pictures=0))
    evaluate(Knowing(dataset, nothing), dataset, config, tmp_path, step=0)
    assert not (tmp_path / "eval/toy/pictures.png").exists()


def test_an_empty_data_set_is_refused(dataset, tmp_path):
    empty = replace(dataset, records=())
    with pytest.raises(InputError, match=r"toy\.json: there is no image"):
        evaluate(Knowing(dataset, nothing), empty, CONFIG, tmp_path, step=0)


def test_what_is_found_is_written_on_ctrl_c(dataset, tmp_path):
    class Interrupted(Knowing):
        def __call__(self, *arguments):
            if len(self.sizes) == 4:
                raise KeyboardInterrupt
            return super().__call__(*arguments)

    folder = tmp_path / "eval/toy"
    message = r"stopped after [34] of 5 images: what was found in them is in .*/predictions_so_far\.json; there are"
    with pytest.raises(errors.Interrupted, match=message):
        evaluate(Interrupted(dataset, lambda found: found), dataset, CONFIG, tmp_path, 3)
    written = json.loads((folder / "predictions_so_far.json").read_text())
    assert len({entry["image_id"] for entry in written}) in (3, 4)
    assert [path.name for path in folder.iterdir()] == ["predictions_so_far.json"]
    assert evaluate(Knowing(dataset, lambda found: found), dataset, CONFIG, tmp_path, 3)["AP"] == pytest.approx(1)
    assert not (folder / "predictions_so_far.json").exists()
