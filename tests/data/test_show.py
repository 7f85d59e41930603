"""The contact sheet of training batches."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from opendet_jax.config import Config, DataConfig, DatasetPaths
from opendet_jax.data import show
from opendet_jax.data.__main__ import main
from opendet_jax.data.formats.records import Category, Dataset, Record
from opendet_jax.data.show import CELL, PADDING, describe, draw_summary, summarise
from opendet_jax.drawing import GAP, colour_of
from opendet_jax.errors import InputError
from tests.data import published

GREY = 100
# How ml_collections loads a file.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


@pytest.fixture
def folder(tmp_path):
    """Three grey pictures, 96 × 48; each shows a zebra in its right half."""
    for i in range(3):
        Image.new("RGB", (96, 48), (GREY, GREY, GREY)).save(tmp_path / f"{i}.png")
    images = [{"id": i, "file_name": f"{i}.png", "width": 96, "height": 48} for i in range(3)]
    annotations = [{"id": i, "image_id": i, "category_id": 1, "bbox": [48, 0, 48, 48]} for i in range(3)]
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "zebra"}]}
    (tmp_path / "set.json").write_text(json.dumps(content))
    return tmp_path


@pytest.fixture
def config(folder):
    paths = DatasetPaths(str(folder / "set.json"), str(folder))
    data = DataConfig(
        train=paths,
        eval=paths,
        batch_size=2,
        buckets=((96, 96),),
        train_short_sides=(48,),
        max_long_side=96,
        crop_probability=0.0,
        flip_probability=0.0,
    )
    return Config(data=data)


def cells(path, count):
    """The pictures of a sheet with one row, without their titles."""
    with Image.open(path) as file:
        sheet = np.asarray(file.convert("RGB"))
    row = [sheet[GAP:-GAP, GAP + i * (CELL + GAP) :][:, :CELL] for i in range(count)]
    return [cell[-CELL:] for cell in row]


def test_boxes_and_padding_are_where_they_are(config, folder):
    said = show.show(config, folder / "out" / "sheet.png", images=3, step=0)
    assert said.splitlines() == [
        "3 training images",
        "step 0: 2 images padded to 96×96, 2 objects",
        "step 1: 2 images padded to 96×96, 2 objects",
        f"{folder}/out/sheet.png: 3 images, 3 objects, 1 names",
        "most frequent: zebra × 3",
    ]
    for cell in cells(folder / "out" / "sheet.png", 3):
        lower, left, right = cell[260:], cell[10:220, 10:220], cell[40:220, 260:460]
        assert lower.min() > PADDING[1][0] - 15
        assert lower.max() < PADDING[0][0] + 15
        np.testing.assert_allclose(left, GREY, atol=10)  # edges of the padding echo when a picture is resized
        np.testing.assert_allclose(right, GREY, atol=10)
        assert (cell[120, 240:242] == colour_of("zebra")).all()


def test_pictures_are_shown_as_they_are_augmented(config, folder):
    flipped = replace(config, data=replace(config.data, flip_probability=1.0))
    show.show(flipped, folder / "sheet.png", images=1, step=7)
    [cell] = cells(folder / "sheet.png", 1)
    assert (cell[120, :2] == colour_of("zebra")).all()
    np.testing.assert_allclose(cell[10:220, 250:460], GREY, atol=10)


def test_from_the_command_line(tmp_path, capsys):
    arguments = ["--config.data.scenes_train=5", "--config.data.scenes_eval=1", "--config.data.batch_size=2"]
    out = tmp_path / "sheet.png"
    main(["show", "--config=configs/scenes_tiny.py", f"--out={out}", "--images=4", "--step=1", *arguments])
    assert f"{out}: 4 images" in capsys.readouterr().out
    with Image.open(out) as sheet:
        assert sheet.width == 4 * (CELL + GAP) + GAP


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=configs/none.py"], "error: --config=configs/none.py: there is no file"),
        (["--config=configs/swin_t.py"], r"error: config\.data\.train\.annotations is empty"),
        (["--config=configs/scenes_tiny.py", "--config.data.scenes=3"], "error: a --config field does not exist"),
    ],
)
def test_what_cannot_be_shown_is_one_line(tmp_path, arguments, message):
    with pytest.raises(SystemExit, match=message):
        main(["show", f"--out={tmp_path / 'sheet.png'}", *arguments])
    assert not list(tmp_path.iterdir())


def test_its_output_is_looked_at_first(folder, config, monkeypatch):
    monkeypatch.setattr(show, "load_datasets", lambda *_: pytest.fail("the data was read"))
    (folder / "file").touch()
    for out, message in ((folder, "is a folder; name a file in it"), (folder / "file/sheet.png", "cannot be written")):
        with pytest.raises(InputError, match=message):
            show.show(config, out, 2, 0)


@pytest.mark.parametrize("form", [published.yolo, published.pascal_voc])
def test_a_label_folder_from_the_command_line(tmp_path, capsys, form):
    annotations, out = form(tmp_path / "set"), tmp_path / "sheet.png"
    paths = [f"--config.data.{section}.annotations={annotations}" for section in ("train", "eval")]
    main(["show", "--config=configs/coco_json.py", f"--out={out}", "--images=2", *paths])
    printed = capsys.readouterr().out
    assert printed.startswith("2 training images\n")
    assert f"{out}: 2 images, 3 objects, 2 names" in printed
    assert out.is_file()


def test_numbers_out_of_range(capsys):
    with pytest.raises(SystemExit):
        main(["show", "--config=configs/scenes_tiny.py", "--out=a.png", "--images=0"])
    assert "0 is less than 1" in capsys.readouterr().err


def test_names_that_cannot_be_learnt_are_said(folder, config):
    """And not what cannot be said: without the tokenizer on this machine the sheet is drawn all the same."""
    content = json.loads((folder / "set.json").read_text())
    content["categories"] = [{"id": 1, "name": "a zebra of the plains"}]
    (folder / "set.json").write_text(json.dumps(content))
    data = replace(config.data, tokenizer="byt5", max_name_tokens=8)
    said = show.show(replace(config, data=data), folder / "sheet.png", images=1, step=0)
    assert "1 of 1 names, of 3 of 3 boxes (100.00%), cannot be learnt: with data.tokenizer = 'byt5'" in said
    assert "'a zebra of the plains' is cut off to 'a zebra', it has 22 tokens" in said
    assert "data.max_name_tokens = 22 has room" in said


def test_without_the_tokenizer_it_is_said_that_names_are_not_checked(folder, config, caplog):
    data = replace(config.data, tokenizer=str(folder / "none"))
    assert "most frequent: zebra" in show.show(replace(config, data=data), folder / "sheet.png", images=1, step=0)
    assert "whether the names can be learnt is not known: data.tokenizer: cannot load" in caplog.text


NAMES = ("$5 bill $", "木", "a_{b", "x" * 300, "dog")


def data_set(*counts):
    records = []
    for i, count in enumerate(counts):
        boxes = np.array([(0, 0, 3 * (n + 1), 3 * (n + 1)) for n in range(count)], np.float32).reshape(-1, 4)
        names = tuple((NAMES[n % len(NAMES)], "thing") for n in range(count))
        records.append(Record(i, Path(f"{i}.jpg"), 90, 90, boxes, names, np.ones(count, np.int64)))
    return Dataset(Path("a.json"), tuple(records), (Category(1, "thing"),))


def test_numbers():
    found = summarise(data_set(5, 0, 2))
    assert found == {
        "images": 3,
        "images_without_boxes": 1,
        "boxes": 7,
        "most_boxes_of_an_image": 5,
        "names": 6,
        "names_of_one_box": 3,
        "categories": 1,
        "box_side_percentiles": {"1": 3.0, "25": 4.5, "50": 6.0, "75": 10.5, "99": 14.82},
        "most_frequent_names": [["thing", 7], ["$5 bill $", 2], ["木", 2], ["a_{b", 1], ["dog", 1], ["x" * 300, 1]],
    }


@pytest.mark.parametrize("counts", [(), (0,), (1,), (5, 0, 2), (400,)])
def test_a_page_of_histograms_of_anything(tmp_path, counts):
    draw_summary(data_set(*counts), "a $ title", tmp_path / "page.png")
    with Image.open(tmp_path / "page.png") as page:
        assert page.size == (1320, 990)
    assert summarise(data_set(*counts))["boxes"] == sum(counts)


def test_lines_to_print():
    values = {
        **summarise(data_set(5, 0)),
        "shards": 2,
        "bytes": 3 * 2**20,
        "problems": {"crowd region": {"count": 1200, "examples": ["a", "b"]}},
        "left_out": [{"image_id": 1, "reason": "gone.jpg: no such image"}],
    }
    assert describe(values).splitlines() == [
        "2 images (1 without boxes), 5 boxes (at most 5 an image), 6 names, 2 shards, 3.0 MiB",
        "  1,200 × crowd region: a; b",
        "  1 × image left out: gone.jpg: no such image",
    ]
