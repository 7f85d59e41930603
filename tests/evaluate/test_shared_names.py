"""Names that several classes bear: what each detection counts for, with both mappings and in a whole evaluation."""

import json
from dataclasses import replace

import numpy as np
import pytest
from absl import logging
from PIL import Image

from opendet_jax.config import Config, DataConfig, EvalConfig
from opendet_jax.data.formats.json_source import read_json
from opendet_jax.data.pipeline import evaluation_batches
from opendet_jax.evaluate.evaluator import Evaluator
from opendet_jax.evaluate.loop import Naming, evaluate, load_naming
from opendet_jax.evaluate.name_mapping import ExactMapping, TextEncoderMapping, class_text, shared_names, shared_said
from opendet_jax.evaluate.report import score_file
from opendet_jax.evaluate.results import ImageResults
from opendet_jax.evaluate.truth import lvis_truth
from opendet_jax.inference import Found, Inference

LEFT, RIGHT, MIDDLE = [10, 10, 30, 30], [60, 60, 30, 30], [40, 10, 20, 20]
IDS = ("exact", "text_encoder")


def category(number, name, *synonyms, **fields):
    return {"id": number, "name": name, "synonyms": list(synonyms), **fields}


def truth_of(folder, categories, *objects, images=3, **image_fields):
    """`objects` are (image, class, box) or (image, class, box, other fields)."""
    content = {
        "images": [
            {"id": i, "file_name": f"{i}.png", "width": 100, "height": 100, **image_fields}
            for i in range(1, images + 1)
        ],
        "annotations": [
            {"id": n, "image_id": i, "category_id": c, "bbox": box} | dict(*rest)
            for n, (i, c, box, *rest) in enumerate(objects, 1)
        ],
        "categories": categories,
    }
    (folder / "truth.json").write_text(json.dumps(content))
    return read_json(folder / "truth.json", folder)[0]


def letters(texts):
    """Texts as unit rows of how often each letter occurs, whatever the case."""
    rows = np.array([[text.lower().count(letter) for letter in "abcdefghijklmnopqrstuvwxyz"] for text in texts], float)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def mapping_of(kind, dataset):
    categories = [{"id": c.id, "name": c.name, "synonyms": c.synonyms} for c in dataset.categories]
    return ExactMapping(categories) if kind == "exact" else TextEncoderMapping(categories, letters)


def score(kind, dataset, found):
    """`found` is {image: [(box, name)]}, the best first. The metrics, and the classes that detections counted for."""
    mapping, evaluator = mapping_of(kind, dataset), Evaluator(lvis_truth(dataset))
    counted = {}
    for image_id, boxes in found.items():
        corners = np.array([[x, y, x + w, y + h] for (x, y, w, h), _ in boxes], np.float32)
        scores = np.linspace(0.9, 0.5, len(boxes)).astype(np.float32)
        boxes = Found(corners, scores, [[name] for _, name in boxes], np.zeros((len(boxes), 1), np.float32))
        image = ImageResults(image_id, boxes, mapping(boxes.names, boxes.scores))
        detections = evaluator.add(image_id, image.detections(), image.boxes())
        counted[image_id] = [entry["category_id"] for entry in image.entries(300, detections.category_ids)]
    return evaluator.finish().metrics, counted


@pytest.mark.parametrize("kind", IDS)
@pytest.mark.parametrize("root", [0, 9])
def test_a_root_class_without_a_box_takes_nothing_away(tmp_path, kind, root):
    categories = [category(root, "pothole", supercategory="none"), category(1, "pothole")]
    dataset = truth_of(tmp_path, categories, (1, 1, LEFT))
    metrics, counted = score(kind, dataset, {1: [(LEFT, "Pothole ")], 2: [(LEFT, "pothole")]})
    assert metrics["AP"] == pytest.approx(1)
    assert metrics["naming_accuracy"] == metrics["recall50"] == 1
    assert counted == {1: [1], 2: [1]}


@pytest.mark.parametrize("kind", IDS)
def test_the_class_with_truth_in_the_image_is_meant(tmp_path, kind):
    categories = [category(5, "traffic_light"), category(2, "Traffic light"), category(7, "TRAFFIC  LIGHT")]
    dataset = truth_of(tmp_path, categories, (1, 5, LEFT), (2, 7, LEFT), images=4)
    found = {i: [(LEFT, "traffic light")] for i in (1, 2, 3)}
    metrics, counted = score(kind, dataset, found)
    assert counted == {1: [5], 2: [7], 3: [5]}  # 2 has no box in the data set
    assert metrics["naming_accuracy"] == 1
    assert metrics["agnostic_AR"] == pytest.approx(1)
    assert score(kind, dataset, {i: found[i] for i in (1, 2)})[0]["AP"] == pytest.approx(1)


@pytest.mark.parametrize("kind", IDS)
def test_of_two_in_one_image_the_one_that_is_overlapped_is_meant(tmp_path, kind):
    categories = [category(1, "cup"), category(2, "Cup")]
    dataset = truth_of(tmp_path, categories, (1, 1, LEFT), (1, 2, RIGHT))
    metrics, counted = score(kind, dataset, {1: [(RIGHT, "cup"), (LEFT, "cup"), (MIDDLE, "cup")]})
    assert counted == {1: [2, 1, 1]}
    assert metrics["AP"] == pytest.approx(1)
    assert metrics["naming_accuracy"] == 1


def test_what_is_to_be_ignored_is_taken_last(tmp_path):
    """A crowd holds its objects wholly; it is met where nothing wanted is."""
    categories = [category(1, "cup"), category(2, "Cup")]
    crowd = (1, 1, [0, 0, 100, 100], {"iscrowd": 1})
    dataset = truth_of(tmp_path, categories, crowd, (1, 2, RIGHT), (2, 1, LEFT), (3, 1, LEFT, {"iscrowd": 1}))
    metrics, counted = score("exact", dataset, {1: [(RIGHT, "cup"), (LEFT, "cup")], 2: [(LEFT, "cup")]})
    assert counted == {1: [2, 1], 2: [1]}
    assert metrics["AP"] == pytest.approx(1)
    assert score("exact", dataset, {3: [(RIGHT, "cup")]})[1] == {3: [1]}


def test_federated_truth(tmp_path):
    """A class that is known to be absent is not truth in the image: the rule stays the same."""
    categories = [category(1, "cup", frequency="c"), category(2, "Cup", frequency="c"), category(3, "cup")]
    fields = {"neg_category_ids": [3, 1], "not_exhaustive_category_ids": []}
    dataset = truth_of(tmp_path, categories, (1, 2, LEFT), (2, 1, LEFT), **fields)
    metrics, counted = score("exact", dataset, {i: [(LEFT, "cup")] for i in (1, 2, 3)})
    assert counted == {1: [2], 2: [1], 3: [1]}
    assert metrics["APc"] == pytest.approx((1 + 1) / 2)  # that of image 3 is a mistake of an equal score, and later
    assert metrics["naming_accuracy"] == 1


def test_where_one_of_the_classes_is_known_to_be_absent_it_is_a_mistake_of_that_class(tmp_path):
    categories = [category(1, "cup", frequency="c"), category(2, "Cup", frequency="c")]
    fields = {"neg_category_ids": [2], "not_exhaustive_category_ids": []}
    dataset = truth_of(tmp_path, categories, (1, 1, LEFT), (2, 2, LEFT), **fields)
    _, counted = score("exact", dataset, {3: [(RIGHT, "cup")]})
    assert counted == {3: [2]}


def test_synonyms(tmp_path):
    """A name goes before a synonym, unless none of its classes has an object; shared synonyms are as shared names."""
    categories = [
        category(1, "sofa", "sofa", "couch"),
        category(2, "bed", "couch", "bunk"),
        category(3, "bunk"),
        category(4, "settee", "sofa"),
    ]
    dataset = truth_of(tmp_path, categories, (1, 2, LEFT), (2, 1, LEFT), (3, 4, LEFT))
    found = {1: [(LEFT, "couch"), (LEFT, "bunk")], 2: [(LEFT, "couch")], 3: [(LEFT, "sofa")]}
    _, counted = score("exact", dataset, found)
    assert counted == {1: [2, 2], 2: [1], 3: [1]}
    mapping = mapping_of("exact", dataset)
    assert [mapping.class_of(name) for name in ("sofa", "couch", "bunk", "settee")] == [1, 1, 3, 4]


@pytest.mark.parametrize("kind", IDS)
def test_nothing_is_shared_where_no_name_is(tmp_path, kind):
    dataset = truth_of(tmp_path, [category(3, "cat"), category(1, "dog", "hound")], (1, 3, LEFT))
    classes = mapping_of(kind, dataset)([["cat"], ["dog"]], np.ones(2, np.float32))
    assert classes.shared is None
    assert classes.ids[:, 0].tolist() == [3, 1]


@pytest.mark.parametrize("kind", IDS)
def test_a_class_without_a_name_is_what_nothing_is_called(tmp_path, kind):
    dataset = truth_of(tmp_path, [category(1, " _ "), category(2, "cat", " ", "_")], (1, 1, LEFT), (1, 2, RIGHT))
    metrics, counted = score(kind, dataset, {1: [(RIGHT, "cat"), (LEFT, "")]})
    assert 1 not in counted[1]
    assert metrics["AP"] == pytest.approx(1)  # its objects are passed over, as in training


def test_classes_of_one_name_take_one_of_the_fifteen_places(tmp_path):
    """Without a box, too: sixteen of them leave room for all others."""
    others = [category(100 + i, letter * 3) for i, letter in enumerate("bcdefghijklmno")]
    categories = [category(i, "pothole") for i in range(16)] + others
    dataset = truth_of(tmp_path, categories, (1, 12, LEFT), (1, 112, RIGHT))
    classes = mapping_of("text_encoder", dataset)([["pothole"]], np.ones(1, np.float32))
    assert classes.ids.shape == (1, 15)
    assert set(classes.ids[0].tolist()) == {0, *range(100, 114)}
    metrics, counted = score("text_encoder", dataset, {1: [(LEFT, "pothole"), (RIGHT, "nnn")]})
    assert counted[1][0] == 12
    assert metrics["AP"] == pytest.approx(1)


def test_which_names_are_shared_is_said():
    categories = [category(i, f"name {i // 2}") for i in range(24)] + [category(99, "other"), category(98, "")]
    shared = shared_names(categories)
    assert len(shared) == 12
    assert shared["name 3"] == (6, 7)
    said = shared_said(shared)
    assert said.startswith("names that several classes bear (12): 'name 0' (0, 1), 'name 1' (2, 3), ")
    assert "'name 9' (18, 19), …" in said
    assert "name 10" not in said
    assert shared_names(categories[::2]) == {}


class Knowing(Inference):
    """Finds every true box, and calls it by its class."""

    def __init__(self, dataset, config):
        self.records = {record.image_id: record for record in dataset.records}
        self.ids = [batch.image_ids for batch in evaluation_batches(dataset, config.data, config.eval.batch_size)]

    def __call__(self, images, sizes, selection, given=None):
        records = [self.records[int(i)] for i in self.ids.pop(0) if i >= 0]
        return [
            Found(
                r.boxes, np.full(len(r.boxes), 0.5, np.float32), [list(n) for n in r.names], np.zeros((len(r.boxes), 1))
            )
            for r in records
        ]


@pytest.mark.parametrize("kind", IDS)
def test_a_whole_evaluation_and_the_file_that_it_writes(tmp_path, kind, monkeypatch, capsys):
    warned = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: warned.append(text % values))
    categories = [category(0, "pothole"), category(1, "pothole"), category(2, "Crack"), category(3, "crack")]
    dataset = truth_of(tmp_path, categories, (1, 1, LEFT), (1, 2, RIGHT), (2, 3, LEFT), (3, 1, RIGHT))
    for i in (1, 2, 3):
        Image.new("RGB", (100, 100)).save(tmp_path / f"{i}.png")
    config = Config(
        data=DataConfig(name="toy", eval_short_side=32, buckets=((32, 32),)), eval=EvalConfig(batch_size=2, pictures=0)
    )
    naming = load_naming(dataset, config)
    assert len(warned) == 1
    assert "names that several classes bear (2): 'pothole' (0, 1), 'crack' (2, 3); a detection counts for" in warned[0]
    naming = replace(naming, mapping=mapping_of(kind, dataset))
    metrics = evaluate(Knowing(dataset, config), dataset, config, tmp_path, 0, Naming(naming.mapping, None))
    assert len(warned) == 1
    assert metrics["AP"] == metrics["coco_AP"] == pytest.approx(1)
    assert metrics["naming_accuracy"] == metrics["recall50"] == 1
    predictions = tmp_path / "eval/toy/predictions.json"
    scored = score_file(dataset.annotations, predictions, "lvis", tmp_path / "scores")
    if kind == "exact":
        assert sorted(entry["category_id"] for entry in json.loads(predictions.read_text())) == [1, 1, 2, 3]
        shared = metrics.keys() & scored.keys()
        assert {key: metrics[key] for key in shared} == {key: scored[key] for key in shared}
    assert "names that several classes bear (2)" in capsys.readouterr().err


def test_a_file_says_its_classes_itself(tmp_path, capsys):
    """They are taken as they are; a name is right whichever of its classes was given."""
    dataset = truth_of(tmp_path, [category(0, "pothole"), category(1, "pothole")], (1, 1, LEFT), images=1)
    record = {"image_id": 1, "category_id": 0, "bbox": LEFT, "score": 0.5}
    (tmp_path / "p.json").write_text(json.dumps([record]))
    metrics = score_file(dataset.annotations, tmp_path / "p.json", "lvis", tmp_path / "scores")
    assert metrics["AP"] == 0
    assert metrics["naming_accuracy"] == 1
    said = "names that several classes bear (1): 'pothole' (0, 1); a detection counts for the class of its category_id"
    assert said in capsys.readouterr().err


def test_what_is_embedded_of_a_shared_name():
    asked = []

    def encode(texts):
        asked.extend(texts)
        return letters(texts)

    TextEncoderMapping(
        [category(4, "pothole"), category(3, "cat"), category(2, "Pot_hole"), category(9, "Pothole")], encode
    )
    assert asked == [class_text("Pot_hole"), class_text("cat"), class_text("pothole")]
