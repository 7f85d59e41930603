"""Every field of the json formats, made wrong in every way: no object is lost without a count, neither of those trained
on nor of those evaluated on, and nothing but InputError ends the reading."""

import copy
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from opendet_jax.data.datasets import read_annotations
from opendet_jax.data.formats.records import Problems
from opendet_jax.errors import InputError
from opendet_jax.evaluate.evaluator import EdgeEvaluator, clip_truth
from opendet_jax.evaluate.results import ScoredBoxes
from opendet_jax.evaluate.truth import Truth, lvis_truth, read_truth

ABSENT = "(absent)"
VALUES = (
    *(ABSENT, None, "", " ", "0", "1", "900", "word", "a, b", "\ud800", True, False, [], [None], ["x", None], [{}], {}),
    *(float("nan"), float("inf"), -1, -1.5, 0, 2, 1.0, 10**9, 2**63, 2**70, 10**300, 1e300, {"id": 1}),
    *([0, 0, float("nan"), 5], [-5, -5, 9, 9], [0, 0, 1e200, 1e200], [10**300] * 4, [50, 50, 5, 5], [1, 1, 0, 5]),
    *([1, 1, -5, 5], ["1", "1", "5", "5"], [1, 1, 5], [1, 1, 5, None], [77], [2**70], [1, "2"]),
)
# What is counted and is an object that is lost; everything else that is counted has its object kept.
LOST = {
    *("unknown image id", "unknown category id", "crowd region", "empty name", "name is not text"),
    *("box is not four finite numbers", "box without area", "box outside its image"),
    "object of an image that is not in image_data.json",
}
LOST_TO_TRUTH = {f"{kind}, passed over" for kind in ("unknown category id", "box that is none", "class without a name")}
CHANGED_IN_TRUTH = {
    "area that is none, the box's taken",
    "larger than 1e10 square pixels, ignored",
    "iscrowd is neither 0 nor 1, taken as 0, box kept",
    "ignore is neither 0 nor 1, taken as 0, box kept",
    "unknown category id in neg_category_ids, left out",
    "unknown category id in not_exhaustive_category_ids, left out",
}
KEPT = {
    "name of more than 200 characters, kept",
    "box clipped to its image",
    "repeated image, its objects added to the first",
    "image that is not in image_data.json",
    "file of another image id too, image kept",
    "repeated annotation id, box kept",
    "repeated object id, box kept",
    "frequency is not r, c, f or u, category kept without",
    "iscrowd is neither 0 nor 1, taken as 0, box kept",
}


def annotation(number: int, image: int, category: int, **fields: Any) -> dict[str, Any]:
    return {"id": number, "image_id": image, "category_id": category, "bbox": [1, 2, 10, 12], **fields}


LVIS = {
    "images": [
        {"id": i, "width": 40, "height": 30, "file_name": f"{i}.jpg", "coco_url": f"http://x/val2017/{i}.jpg"}
        | {"neg_category_ids": [2], "not_exhaustive_category_ids": [1], "license": 1}
        for i in (1, 2)
    ],
    "annotations": [
        annotation(1, 1, 1, area=60.0, iscrowd=0, ignore=0, segmentation=[[1, 1, 9, 1, 9, 9]]),
        annotation(2, 1, 2, area=60.0, iscrowd=1, names=["bus", "coach"]),
        annotation(3, 2, 1, area=60.0, ignore=1, caption="a bus, red", object_name="bus", caption_with_token="bus"),
        annotation(4, 2, 2),
    ],
    "categories": [
        {"id": 1, "name": "bus_(vehicle)", "synonyms": ["autobus", "coach"], "frequency": "c", "def": "a bus"},
        {"id": 2, "name": "Bus (vehicle)", "supercategory": "none"},
    ],
}
VISUAL_GENOME = {
    "objects": [
        {"image_id": i, "objects": [{"object_id": 10 * i + n, "x": 1, "y": 2, "w": 9, "h": 9} for n in (0, 1)]}
        for i in (1, 2)
    ],
    "image_data": [{"image_id": i, "width": 40, "height": 30, "url": f"https://x/VG_100K/{i}.jpg"} for i in (1, 2)],
}
for described in (found for image in VISUAL_GENOME["objects"] for found in image["objects"]):
    described["names"] = ["tree", "oak"]
IMAGE_FIELDS = ("id", "width", "height", "file_name", "coco_url", "neg_category_ids", "not_exhaustive_category_ids")
OBJECT_FIELDS = ("id", "image_id", "category_id", "bbox", "area", "iscrowd", "ignore")
NAME_FIELDS = ("names", "caption_with_token", "object_name", "caption")
PLACES = [  # the list, its entries that are made wrong, their fields
    ("images", [0], IMAGE_FIELDS),
    ("annotations", [0, 2], (*OBJECT_FIELDS, *NAME_FIELDS)),
    ("categories", [0], ("id", "name", "synonyms", "frequency", "supercategory")),
]
LVIS_PLACES = [(part, index, field) for part, indices, fields in PLACES for index in indices for field in fields]
VG_PLACES = [
    *(("images", 0, field) for field in ("image_id", "objects")),
    *(("image_data", 0, field) for field in ("image_id", "width", "height", "url")),
    *(("objects", 0, field) for field in ("object_id", "x", "y", "w", "h", "names")),
]
Fault = tuple[tuple[str, int, str], Any]


def singles(places: list[tuple[str, int, str]]) -> Iterator[list[Fault]]:
    return ([(place, value)] for place in places for value in VALUES)


def several(places: list[tuple[str, int, str]]) -> st.SearchStrategy[list[Fault]]:
    return st.lists(st.tuples(st.sampled_from(places), st.sampled_from(VALUES)), min_size=2, max_size=4)


many = settings(
    max_examples=150,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def spoil(entry: dict[str, Any], field: str, value: Any) -> None:
    if value is ABSENT:
        entry.pop(field, None)
    else:
        entry[field] = copy.deepcopy(value)


def assert_nothing_is_lost(path, folder, objects: int, scored: bool) -> None:
    """`objects` of the file are read or counted, to be found or counted; or the file is refused, by its name."""
    try:
        dataset, problems = read_annotations(path, folder)
    except InputError as error:
        said = str(error)
        assert str(folder) in said
        assert len(said.splitlines()) == 1
        assert len(said) < 500
        return
    assert problems.counts.keys() <= LOST | KEPT
    lost = sum(count for kind, count in problems.counts.items() if kind in LOST)
    assert sum(len(record.boxes) for record in dataset.records) + lost == objects, problems
    if path.name == "a.json":  # the truth of Visual Genome's form are its records
        assert_the_truth_is_whole(dataset, objects - problems.counts.get("unknown image id", 0), path, scored)
        if scored:
            assert_a_file_is_scored_on_all_of_it(path, objects)


def assert_the_truth_is_whole(dataset, objects: int, path, scored: bool) -> None:
    problems = Problems()
    try:
        content = lvis_truth(dataset, problems=problems)
    except InputError as error:
        said = str(error)
        assert said.startswith(f"{path}: image ")
        return
    assert problems.counts.keys() <= LOST_TO_TRUTH | CHANGED_IN_TRUTH
    lost = sum(count for kind, count in problems.counts.items() if kind in LOST_TO_TRUTH)
    assert len(content["annotations"]) + lost == objects, problems
    too_large = problems.counts.get("larger than 1e10 square pixels, ignored", 0)
    ignored = sum(entry["ignore"] for entry in content["annotations"])
    to_be_found = int(Truth(content).wanted[:, 0].sum())
    assert len(content["annotations"]) - ignored - too_large <= to_be_found <= len(content["annotations"]) - ignored
    inside, edges = clip_truth(content, dataset)
    assert len(inside["annotations"]) + edges.outside == len(content["annotations"])
    if scored:
        assert_it_can_be_scored(content, dataset)


def assert_it_can_be_scored(content, dataset) -> None:
    evaluator = EdgeEvaluator(content, dataset)
    for record in dataset.records:
        boxes = np.concatenate([record.boxes[:, :2], record.boxes[:, 2:] - record.boxes[:, :2]], axis=1)
        evaluator.add(record.image_id, ScoredBoxes(record.category_ids, boxes.astype(float), np.ones(len(boxes))))
    evaluation, edges = evaluator.finish()
    metrics = evaluation.metrics | edges
    shares = [value for key, value in metrics.items() if not key.startswith("boxes_")]
    assert all(value is None or 0 <= value <= 1 for value in shares), metrics


def assert_a_file_is_scored_on_all_of_it(path, objects: int) -> None:
    """`python -m opendet_jax.evaluate` takes every annotation, or refuses the file."""
    try:
        content = read_truth(path, path.parent, minival=False)[1]
    except InputError as error:
        said = str(error)
        assert str(path.parent) in said
        assert len(said.splitlines()) == 1
        return
    assert len(content["annotations"]) == objects


def sweep_lvis(folder, faults: list[Fault], scored: bool = False) -> None:
    content = copy.deepcopy(LVIS)
    for (part, index, field), value in faults:
        spoil(content[part][index], field, value)
    (folder / "a.json").write_text(json.dumps(content))
    assert_nothing_is_lost(folder / "a.json", folder, len(content["annotations"]), scored)


def sweep_visual_genome(folder, faults: list[Fault]) -> None:
    content = copy.deepcopy(VISUAL_GENOME)
    for (part, index, field), value in faults:
        if part == "objects" and isinstance(content["objects"][1].get("objects"), list):
            listed = content["objects"][1]["objects"]
            if len(listed) > index and isinstance(listed[index], dict):
                spoil(listed[index], field, value)
        elif part != "objects":
            spoil(content["objects" if part == "images" else part][index], field, value)
    (folder / "objects.json").write_text(json.dumps(content["objects"]))
    (folder / "image_data.json").write_text(json.dumps(content["image_data"]))
    listed = (image.get("objects") for image in content["objects"])
    objects = sum(len(found) for found in listed if isinstance(found, list))
    assert_nothing_is_lost(folder / "objects.json", folder, objects, scored=False)


def test_one_field_of_lvis_form(tmp_path):
    for faults in singles(LVIS_PLACES):
        sweep_lvis(tmp_path, faults)


def test_one_field_of_visual_genomes_form(tmp_path):
    for faults in singles(VG_PLACES):
        sweep_visual_genome(tmp_path, faults)


@many
@given(several(LVIS_PLACES))
def test_several_fields_of_lvis_form(tmp_path, faults):
    sweep_lvis(tmp_path, faults, scored=True)


@many
@given(several(VG_PLACES))
def test_several_fields_of_visual_genomes_form(tmp_path, faults):
    sweep_visual_genome(tmp_path, faults)


@pytest.mark.parametrize("part", ["images", "annotations", "categories"])
@pytest.mark.parametrize("entry", [None, 5, "text", [], float("nan")])
def test_entries_that_are_none(tmp_path, part, entry):
    content = copy.deepcopy(LVIS)
    content[part].append(entry)
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=rf"a\.json: {part}\[\d\] has no field"):
        read_annotations(tmp_path / "a.json", tmp_path)
