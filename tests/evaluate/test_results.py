import json

import numpy as np
import pytest

from opendet_jax.data.json_source import read_json
from opendet_jax.data.records import Dataset
from opendet_jax.evaluate.name_mapping import UNMAPPED, ExactMapping
from opendet_jax.evaluate.results import results_of
from opendet_jax.evaluate.truth import lvis_truth
from opendet_jax.files import replacing, write_json
from opendet_jax.inference import Found


def test_results():
    found = Found(
        boxes=np.array([[1, 2, 11, 22.5], [0, 0, 1 / 3, 1]], np.float32),
        scores=np.array([0.75, 0.5], np.float32),
        names=[["Cat ", "dog"], ["a thing", ""]],
        name_scores=np.array([[-0.25, -1], [-0.5, -2]], np.float32),
    )
    first, second = results_of(8, found, ExactMapping([{"id": 3, "name": "cat"}]))
    assert first == {
        "image_id": 8,
        "category_id": 3,
        "bbox": [1.0, 2.0, 10.0, 20.5],
        "score": 0.75,
        "names": ["Cat ", "dog"],
        "name_scores": [-0.25, -1.0],
    }
    assert second["category_id"] == UNMAPPED
    assert second["bbox"] == [0.0, 0.0, 0.333, 1.0]
    json.dumps([first, second])


def test_files_are_whole_or_absent(tmp_path):
    target = tmp_path / "new/file.json"
    write_json(target, {"a": None})
    assert json.loads(target.read_text()) == {"a": None}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(target, {"a": float("nan")})
    with pytest.raises(FileNotFoundError), replacing(target):  # nothing written
        pass
    assert json.loads(target.read_text()) == {"a": None}
    assert list(target.parent.iterdir()) == [target]


@pytest.fixture
def coco(tmp_path):
    """A json in COCO's form: no frequencies, no lists of absent classes, a crowd region, a box without area."""
    box = {"image_id": 1, "category_id": 2, "bbox": [0, 0, 5, 6], "area": 11.5, "id": 1}
    content = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": 20, "height": 10} for i in (1, 2)],
        "annotations": [
            box,
            {**box, "id": 2, "iscrowd": 1},
            {**box, "id": 3, "bbox": [0, 0, 0, 6]},
            {key: value for key, value in box.items() if key != "area"},
            {**box, "id": 5, "image_id": 2},
            {**box, "id": 6, "category_id": 77},
        ],
        "categories": [{"id": 2, "name": "hot_dog"}, {"id": 4, "name": "cat"}],
    }
    (tmp_path / "coco.json").write_text(json.dumps(content))
    dataset, _ = read_json(tmp_path / "coco.json", tmp_path)
    return dataset


def test_truth_of_a_coco_json(coco: Dataset):
    truth = lvis_truth(coco.first(1))
    assert truth["images"] == [{"id": 1, "neg_category_ids": [2, 4], "not_exhaustive_category_ids": []}]
    assert [(a["area"], a["ignore"]) for a in truth["annotations"]] == [(11.5, 0), (11.5, 1), (30, 0)]
    assert truth["categories"][0] == {"id": 2, "name": "hot dog", "synonyms": [], "frequency": ""}
    assert len(lvis_truth(coco)["annotations"]) == 4
