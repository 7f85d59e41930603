import errno
import itertools
import json
import os

import numpy as np
import pytest
from PIL import Image

from opendet_jax.config import Config, PredictConfig
from opendet_jax.errors import InputError, Interrupted
from opendet_jax.predict.detector import Detector
from opendet_jax.predict.predictions import find_inputs, predict_files, predict_from_config
from tests.predict.test_detector import detector  # noqa: F401


@pytest.fixture
def folder(tmp_path):
    """Two pictures of one name, one in a folder below, and a file that is no picture."""
    (tmp_path / "in/below").mkdir(parents=True)
    for i, name in enumerate(("a.png", "a.jpg", "below/c.png")):
        Image.new("RGB", (60, 30 + i), (200, 100, 0)).save(tmp_path / "in" / name)
    (tmp_path / "in/broken.jpg").write_bytes(b"\xff\xd8 nothing")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/notes.txt").write_text("nothing")
    return tmp_path


def run(detector, folder, pattern, out="out", **settings):  # noqa: F811
    return predict_files(detector, PredictConfig(inputs=str(folder / pattern), **settings), folder / out)


def test_pictures_and_predictions(detector, folder, capsys):  # noqa: F811
    entries = run(detector, folder, "in/**/*.*", min_score=0.0, nms_iou=1.0)
    assert json.loads((folder / "out/predictions.json").read_text()) == entries
    assert [entry["file"] for entry in entries] == [
        str(folder / "in" / name) for name in ("a.jpg", "a.png", "below/c.png")
    ]
    assert [entry["picture"] for entry in entries] == ["a.png", "a_2.png", "c.png"]
    keys = {"file", "picture", "boxes", "scores", "names", "alternatives", "name_scores"}
    assert all(entry.keys() == keys and len(entry["boxes"]) == 3 for entry in entries)
    np.testing.assert_allclose(entries[1]["boxes"][1], [0, 0, 60, 30])
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["a.png", "a_2.png", "c.png", "predictions.json"]
    with Image.open(folder / "out/c.png") as picture:
        assert picture.size == (480, 256)
    assert "broken.jpg: " in capsys.readouterr().err


def test_settings_are_used(detector, folder):  # noqa: F811
    [entry] = run(detector, folder, "in/below/*")
    assert len(entry["boxes"]) == 1
    [entry] = run(detector, folder, "in/below/*", max_detections=1, min_score=0.0, nms_iou=1.0)
    assert len(entry["boxes"]) == 1


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("in/*.gif", r"predict\.inputs: no file matches '.*in/\*\.gif'"),
        ("in/belo[w]", r"predict\.inputs: no file matches '.*in/belo\[w\]'; what matches are folders, as .*in/below"),
        ("in/a.pngx", r"predict\.inputs: no file matches '.*in/a\.pngx'"),
        ("empty", r"predict\.inputs: there is no picture in the folder .*empty, which holds 1 files"),
        ("in/broken.jpg", r"predict\.inputs: none of the 1 files .* is an image"),
    ],
)
def test_nothing_to_look_at(detector, folder, pattern, message):  # noqa: F811
    with pytest.raises(InputError, match=message):
        run(detector, folder, pattern)
    assert not (folder / "out/predictions.json").exists()


@pytest.mark.parametrize("given", ["in/below", "in/below/", "in/below/c.png"])
def test_a_folder_is_its_pictures(detector, folder, given, capsys):  # noqa: F811
    (folder / "in/below/notes.txt").write_text("nothing")
    (folder / "in/below/.hidden.png").write_bytes(b"")
    (folder / "in/below/deeper.png").mkdir()
    [entry] = run(detector, folder, given)
    assert entry["file"] == str(folder / "in/below/c.png")
    said = "left out: 1 files of " + str(folder / "in/below") + " that are no pictures, as notes.txt"
    assert (said in capsys.readouterr().err) == (not given.endswith("png"))


@pytest.mark.parametrize(
    ("on_disk", "given", "found"),
    [
        (["photo[1].png", "photo1.png"], "photo[1].png", ["photo[1].png"]),
        (["photo1.png"], "photo[1].png", ["photo1.png"]),
        (["dir[2024]/a.png", "dir2/b.png"], "dir[2024]/", ["dir[2024]/a.png"]),
        (["dir[2024]/a.png", "dir2/b.png"], "dir[2024]/*.png", ["dir[2024]/a.png"]),
        (["dir[2024]/x1/a.png", "dir[2024]/x2/b.png"], "dir[2024]/x[2]/*", ["dir[2024]/x2/b.png"]),
        (["dir2/a.png"], "dir[2024]/*.png", ["dir2/a.png"]),
        (["what?.png", "whats.png"], "what?.png", ["what?.png"]),
        (["*.png", "a.png"], "*.png", ["*.png"]),
        (["a/b/c.png", "a/d.PNG"], "a/**/*.[pP][nN][gG]", ["a/b/c.png", "a/d.PNG"]),
    ],
)
@pytest.mark.parametrize("absolute", [True, False])
def test_what_is_there_is_no_glob(tmp_path, on_disk, given, found, absolute, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in on_disk:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9)).save(tmp_path / name)
    root = f"{tmp_path}/" if absolute else ""
    assert [str(path) for path in find_inputs(root + given)] == [root + name for name in found]


def test_a_folder_that_cannot_be_made(detector, folder):  # noqa: F811
    with pytest.raises(InputError, match=r"predict\.output: .*a\.png/out cannot be made: .*a\.png is no folder"):
        run(detector, folder, "in/*", out="in/a.png/out")
    with pytest.raises(InputError, match=r"predict\.output: .*broken\.jpg cannot be made: .*broken\.jpg is no folder"):
        run(detector, folder, "in/*.png", out="in/broken.jpg")


def test_a_folder_that_may_not_be_written_to(detector, folder, monkeypatch):  # noqa: F811
    monkeypatch.setattr("os.access", lambda path, mode: path != folder)
    with pytest.raises(InputError, match=r"predict\.output: .* may not be written to"):
        run(detector, folder, "in/*")
    assert not (folder / "out").exists()


def test_a_full_disk(detector, folder, monkeypatch):  # noqa: F811
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(
        InputError, match=r"predict\.output: .*out/a\.png cannot be written to: No space left on device"
    ):
        run(detector, folder, "in/*")


def test_a_picture_that_cannot_be_written_costs_none_before_it(detector, folder, monkeypatch):  # noqa: F811
    save = Image.Image.save

    def full_at_the_second(image, part, **format):
        if (folder / "out/a.png").exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(image, part, **format)

    monkeypatch.setattr(Image.Image, "save", full_at_the_second)
    with pytest.raises(InputError, match=r"out/a_2\.png cannot be written to"):
        run(detector, folder, "in/*")
    [entry] = json.loads((folder / "out/predictions.json").read_text())
    assert entry["picture"] == "a.png"


def test_an_error_of_any_kind_costs_no_picture_before_it(detector, folder, monkeypatch):  # noqa: F811
    stream = Detector.detect_stream

    def first_alone(*given, **settings):
        yield next(stream(*given, **settings))
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(Detector, "detect_stream", first_alone)
    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
        run(detector, folder, "in/*")
    [entry] = json.loads((folder / "out/predictions.json").read_text())
    assert entry["picture"] == "a.png"


def test_names_of_files_that_are_long_or_no_text(detector, folder):  # noqa: F811
    """80 Chinese letters; and a byte that is none of UTF-8."""
    names = ["画" * 80 + ".png", os.fsdecode(b"caf\xe9.png")]
    (folder / "odd").mkdir()
    for name in names:
        Image.new("RGB", (60, 30)).save(folder / "odd" / name)
    entries = run(detector, folder, "odd")
    assert sorted(entry["picture"] for entry in entries) == sorted(names)
    assert json.loads((folder / "out/predictions.json").read_text(encoding="utf-8")) == entries
    assert {os.fsencode(path.name) for path in (folder / "out").iterdir()} == {
        b"predictions.json",
        *map(os.fsencode, names),
    }


def test_links_to_nothing_are_counted(detector, folder, capsys):  # noqa: F811
    (folder / "in/below/gone.png").symlink_to(folder / "nowhere.png")
    assert len(run(detector, folder, "in/below")) == 1
    assert f"left out: 1 links of {folder}/in/below to nothing, as gone.png" in capsys.readouterr().err


def interrupted_at(image, monkeypatch):
    detect, calls = Detector._detect_batch, itertools.count()

    def interrupting(*arguments):
        if next(calls) == image:
            raise KeyboardInterrupt
        return detect(*arguments)

    monkeypatch.setattr(Detector, "_detect_batch", interrupting)


def test_what_is_done_is_written_on_ctrl_c(detector, folder, monkeypatch):  # noqa: F811
    interrupted_at(2, monkeypatch)
    with pytest.raises(Interrupted, match=r"^stopped: 2 of 4 images are done, .*predictions\.json are in .*out$"):
        run(detector, folder, "in/**/*.*", batch_size=1)
    entries = json.loads((folder / "out/predictions.json").read_text())
    assert [entry["picture"] for entry in entries] == ["a.png", "a_2.png"]
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["a.png", "a_2.png", "predictions.json"]


def test_ctrl_c_before_the_first_image(detector, folder, monkeypatch):  # noqa: F811
    interrupted_at(0, monkeypatch)
    with pytest.raises(Interrupted, match="stopped before the first of 3 images was done: nothing is written"):
        run(detector, folder, "in/*.*")
    assert not list((folder / "out").iterdir())


@pytest.mark.parametrize(
    ("predict", "message"),
    [
        ({"inputs": "no/such/*.jpg"}, r"predict\.inputs: no file matches"),
        ({"inputs": "in/*", "output": "in/a.png/out"}, r"predict\.output: .* cannot be made"),
    ],
)
def test_inputs_and_output_are_looked_at_before_the_model(folder, predict, message, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr("opendet_jax.predict.predictions.load_with", lambda *_: pytest.fail("loaded"))
    with pytest.raises(InputError, match=message):
        predict_from_config(Config(predict=PredictConfig(**predict)), folder / "run")
    assert not (folder / "run").exists()


def test_the_limit_of_pixels(detector, folder, capsys):  # noqa: F811
    predict = PredictConfig(inputs=str(folder / "in/below/c.png"))
    with pytest.raises(InputError, match="none of the 1 files"):
        predict_files(detector, predict, folder / "out", max_pixels=100)
    assert "c.png: has 60×32 = 1,920 pixels, more than data.max_pixels = 100" in capsys.readouterr().err


def test_no_inputs(detector, tmp_path):  # noqa: F811
    with pytest.raises(InputError, match=r"predict\.inputs is empty"):
        predict_files(detector, PredictConfig(), tmp_path)


def test_inputs_are_never_replaced(detector, folder):  # noqa: F811
    before = (folder / "in/a.png").read_bytes()
    with pytest.raises(InputError, match=r"predict\.output: .*would replace .*a\.png"):
        run(detector, folder, "in/*.png", out="in")
    assert (folder / "in/a.png").read_bytes() == before
