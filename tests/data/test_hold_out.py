"""What is held out of the training images: which ones, copies of one photograph, the other parts of a mixture."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from absl import logging
from PIL import Image

from opendet_jax.checkpoints.same_config import as_written
from opendet_jax.config import Config, DataConfig, DatasetPaths
from opendet_jax.config_files import parse_config
from opendet_jax.data.datasets import (
    _announce,
    copies,
    hold_out,
    load_datasets,
    load_evaluation,
    with_own_hold_out,
)
from opendet_jax.data.formats.json_source import AnnotationError, read_json
from opendet_jax.data.formats.records import Category, Dataset, Record
from tests.data.test_datasets import DATA, folder, paths  # noqa: F401

# ruff: noqa: F811 (arguments that pytest fills with the fixture)


def test_a_part_is_held_out_where_there_is_nothing_to_evaluate_on(folder, caplog):
    logging.use_absl_handler()
    config = Config(data=replace(DATA, train=paths(folder, "animals"), held_out=0.2))
    with caplog.at_level("WARNING"):
        train, evaluation = load_datasets(config, folder)
    assert "HELD OUT FOR EVALUATION: 4 of the 20 images" in caplog.text
    ids = [{record.image_id for record in records} for records in (train.records, evaluation.records)]
    assert (len(ids[0]), len(ids[1])) == (16, 4)
    assert not ids[0] & ids[1]
    again = load_evaluation(config, folder)
    assert [record.image_id for record in again.records] == [record.image_id for record in evaluation.records]


@pytest.mark.parametrize("by", ["photographs", "images"])
def test_what_is_held_out_is_in_no_other_part_of_the_mixture(folder, tmp_path, caplog, by):
    """Another json of the same pictures; and one of a copy of each, which are told apart by content alone."""
    logging.use_absl_handler()
    for picture in folder.glob("*.png"):
        shutil.copy(picture, tmp_path / picture.name)
    shutil.copy(folder / "things.json", tmp_path / "things.json")
    mixture = (paths(folder, "things"), paths(tmp_path, "things"))
    data = replace(DATA, train=paths(folder, "animals"), mixture=mixture, held_out=0.2, held_out_by=by)
    with caplog.at_level("WARNING"):
        train, evaluation = load_datasets(Config(data=data), folder)
    held = {record.path for record in evaluation.records}
    assert len(held) == 4
    animals, same, copied = (part.records for part in train.parts)
    assert len(animals) == len(same) == 16
    assert not held & {record.path for record in same}
    assert f"{folder / 'things.json'}: 4 images left out: they show what is held out for evaluation" in caplog.text
    left = {path.name for path in held} & {record.path.name for record in copied}
    assert len(left) == (0 if by == "photographs" else 4)


def test_a_part_of_the_mixture_that_is_all_held_out(folder, tmp_path):
    config = Config(data=replace(DATA, train=paths(folder, "animals"), held_out=0.2))
    held = [record.image_id for record in load_datasets(config, folder)[1].records]
    content = json.loads((folder / "things.json").read_text())
    content["images"] = [image for image in content["images"] if image["id"] in held]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in held]
    (tmp_path / "few.json").write_text(json.dumps(content))
    mixture = (DatasetPaths(str(tmp_path / "few.json"), str(folder)),)
    with pytest.raises(AnnotationError, match=r"few\.json: every image is held out for evaluation"):
        load_datasets(replace(config, data=replace(config.data, mixture=mixture)), folder)


def test_what_is_held_out_hardly_changes_with_more_images(folder):
    whole = read_json(folder / "animals.json", folder)[0]
    few, many = ({r.image_id for r in hold_out(set_, 0.2)[1].records} for set_ in (whole.first(15), whole))
    assert len(few) == 3
    assert len(few & many) >= 2
    assert [len(part) for part in hold_out(whole.first(2), 0.9)] == [1, 1]


def of_classes(*images: str) -> Dataset:
    """A picture for each word, with an object for each of its letters; ids from 0, categories by letter."""
    categories = tuple(Category(ord(letter), letter) for letter in sorted(set("".join(images))))
    records = []
    for number, letters in enumerate(images):
        boxes = np.tile(np.array([0, 0, 9, 9], np.float32), (len(letters), 1))
        ids = np.array([ord(letter) for letter in letters], np.int64)
        path = Path(f"/none/{number}.jpg")
        records.append(Record(number, path, 9, 9, boxes, tuple((letter,) for letter in letters), ids))
    return Dataset(Path("mine.json"), tuple(records), categories)


def letters(dataset: Dataset) -> list[set[str]]:
    return [{chr(number) for number in record.category_ids} for record in dataset.records]


@pytest.mark.parametrize("seed", range(20))
def test_each_class_of_two_images_has_one_on_each_side(seed):
    """However few are held out; one of a single image is on either."""
    rng = np.random.default_rng(seed)
    images = ["".join(rng.choice(list("abcdef"), rng.integers(0, 3), replace=False)) for _ in range(10)]
    images += ["g", "g", "h", "", "ab", "bc", "cd", "de", "ef", "fa"]
    dataset = of_classes(*images)
    train, held = hold_out(dataset, 0.05)
    assert set().union(*letters(held)) >= set("abcdefg")
    assert set().union(*letters(train)) >= set("abcdefg")
    assert len(train) + len(held) == len(dataset)
    assert len(held) <= 8


def test_what_was_held_out_stays_where_every_class_has_an_image():
    """The selection by ids alone is what is added to."""
    rich = of_classes(*["ab"] * 40)
    alone, now = (hold_out(rich, 0.2, by)[1] for by in ("images", "photographs"))
    assert [r.image_id for r in now.records] == [r.image_id for r in alone.records]
    poor = of_classes(*["ab"] * 40, "c", "c")
    alone, now = ({r.image_id for r in hold_out(poor, 0.2, by)[1].records} for by in ("images", "photographs"))
    assert alone <= now
    assert len(now - alone) <= 1


def test_the_best_image_for_several_classes_is_held_out():
    assert letters(hold_out(of_classes(*["a", "b", "c", "abc"] * 2, *["x"] * 12), 0.01)[1]).count({"a", "b", "c"}) == 1


def test_few_held_out_images_are_listed_and_classes_of_one_named(folder, tmp_path, caplog):
    logging.use_absl_handler()
    content = json.loads((folder / "animals.json").read_text())
    content["categories"] += [{"id": 2, "name": "yak"}]
    content["annotations"][3]["category_id"] = 2
    (tmp_path / "rare.json").write_text(json.dumps(content))
    data = replace(DATA, train=DatasetPaths(str(tmp_path / "rare.json"), str(folder)), held_out=0.1)
    _, evaluation = load_datasets(Config(data=data), folder)
    lines = caplog.messages[-1].split("\n")
    assert lines[1 : 1 + len(evaluation)] == [f"  {record.path}: cat" for record in evaluation.records]
    assert lines[-1] == "1 classes have no image held out: they have one, or none that can be spared: 'yak'"


def test_many_held_out_images_are_not_listed(caplog):
    logging.use_absl_handler()
    _announce(*hold_out(of_classes(*["a"] * 200), 0.5), 0.5)
    assert "\n" not in caplog.messages[-1]


def pictures(folder: Path, *contents: tuple[str, int]) -> Dataset:
    """Pictures of these names and colours, in this order."""
    dataset, records = of_classes(*["a"] * len(contents)), []
    for record, (name, colour) in zip(dataset.records, contents, strict=True):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (9, 9), (colour, 0, 0)).save(folder / name)
        records.append(replace(record, path=folder / name))
    return replace(dataset, records=tuple(records))


def grouped(dataset: Dataset) -> list[list[int]]:
    return [[record.image_id for record in unit] for unit in copies(dataset.records)]


def test_copies_by_name_and_by_content(tmp_path):
    dataset = pictures(
        tmp_path,
        ("street_jpg.rf.0123456789abcdef0123456789abcdef.jpg", 1),
        ("b.png", 2),
        ("street_jpg.rf.aBcD1234.jpg", 3),
        ("other_jpg.rf.0123456789abcdef0123456789abcdef.jpg", 4),
        ("sub/b again.png", 2),
        ("c.png", 5),
        ("street_png.rf.00.jpg", 6),
        ("other_jpg.rf.1.jpg", 3),
    )
    # The last is a copy of "street" by its content, and of "other" by its name: all are one photograph.
    assert grouped(dataset) == [[0, 2, 3, 7], [1, 4], [5], [6]]
    (tmp_path / "b.png").unlink()
    assert grouped(dataset) == [[0, 2, 3, 7], [1], [4], [5], [6]], "what is missing has no copy"


def test_a_name_that_many_photographs_have_says_nothing(tmp_path):
    dataset = pictures(tmp_path, *((f"image_jpg.rf.{i}.png", i) for i in range(51)))
    assert len(copies(dataset.records)) == 51
    assert len(copies(dataset.records[:50])) == 1


def test_files_of_one_length_and_end_are_compared_whole(tmp_path):
    dataset = of_classes("a", "a", "a")
    for record, begin in zip(dataset.records, b"xyx", strict=True):
        (tmp_path / f"{record.image_id}").write_bytes(bytes([begin]) + bytes(10_000))
    records = [replace(record, path=tmp_path / f"{record.image_id}") for record in dataset.records]
    assert grouped(replace(dataset, records=tuple(records))) == [[0, 2], [1]]


def test_copies_are_on_one_side(tmp_path):
    names = [(f"{i // 3}_jpg.rf.{i}.jpg", i) for i in range(30)]
    train, held = hold_out(pictures(tmp_path, *names), 0.3)
    sides = [{record.path.name.partition("_")[0] for record in part.records} for part in (train, held)]
    assert not sides[0] & sides[1]
    assert (len(train), len(held)) == (21, 9)
    alone = hold_out(pictures(tmp_path, *names), 0.3, "images")[1]
    assert len({record.path.name.partition("_")[0] for record in alone.records}) > 3, "as versions before did"


def test_copies_of_one_photograph_cannot_be_held_out(tmp_path):
    dataset = pictures(tmp_path, ("a.rf.1.jpg", 1), ("a.rf.2.jpg", 2))
    assert hold_out(dataset, 0.5) == (dataset, dataset)


def test_evaluating_on_the_training_images_is_said_loudly(folder, caplog):
    logging.use_absl_handler()
    config = Config(data=replace(DATA, train=paths(folder, "animals"), held_out=0.0))
    with caplog.at_level("WARNING"):
        train, evaluation = load_datasets(config, folder)
    assert "EVALUATED ON WHAT IT IS TRAINED ON" in caplog.text
    assert train.records == evaluation.records


def test_a_run_is_evaluated_on_what_it_held_out_itself(caplog):
    data = DataConfig(train=DatasetPaths("here/mine.json"))
    run = replace(Config(), data=replace(data, held_out=0.25, held_out_by="images"))
    now = replace(Config(), data=replace(data, train=DatasetPaths("moved/mine.json")))
    given = with_own_hold_out(now, run)
    assert (given.data.held_out, given.data.held_out_by) == (0.25, "images")
    assert given.data.train == now.data.train
    assert "data.held_out = 0.25 and data.held_out_by = 'images', as the run was trained, not 0.1" in caplog.text
    other = replace(now, data=replace(now.data, train=DatasetPaths("other.json")))
    named = replace(now, data=replace(now.data, eval=DatasetPaths("eval.json")))
    assert (with_own_hold_out(other, run), with_own_hold_out(named, run)) == (other, named)


def test_a_config_of_before_held_out_by_images():
    saved = Config().to_dict()
    del saved["data"]["held_out_by"]
    assert parse_config(as_written(saved)).data.held_out_by == "images"
    assert parse_config(as_written(Config().to_dict())).data.held_out_by == "photographs"
