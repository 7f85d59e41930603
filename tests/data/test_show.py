"""The contact sheet of training batches."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from opendet_jax.config import Config, DataConfig, DatasetPaths
from opendet_jax.data import show
from opendet_jax.data.__main__ import main
from opendet_jax.data.show import CELL, PADDING
from opendet_jax.drawing import GAP, colour_of

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
        (["--config=configs/none.py"], "error: --config: "),
        (["--config=configs/swin_t.py"], r"error: config\.data\.train\.annotations is empty"),
        (["--config=configs/scenes_tiny.py", "--config.data.scenes=3"], "error: a --config field does not exist"),
    ],
)
def test_what_cannot_be_shown_is_one_line(tmp_path, arguments, message):
    with pytest.raises(SystemExit, match=message):
        main(["show", f"--out={tmp_path / 'sheet.png'}", *arguments])
    assert not list(tmp_path.iterdir())


def test_numbers_out_of_range(capsys):
    with pytest.raises(SystemExit):
        main(["show", "--config=configs/scenes_tiny.py", "--out=a.png", "--images=0"])
    assert "0 is less than 1" in capsys.readouterr().err
