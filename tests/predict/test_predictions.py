import json

import numpy as np
import pytest
from PIL import Image

from opendet_jax.config import PredictConfig
from opendet_jax.errors import InputError
from opendet_jax.predict.predictions import predict_files
from tests.predict.test_detector import detector  # noqa: F401


@pytest.fixture
def folder(tmp_path):
    """Two pictures of one name, one in a folder below, and a file that is no picture."""
    (tmp_path / "in/below").mkdir(parents=True)
    for i, name in enumerate(("a.png", "a.jpg", "below/c.png")):
        Image.new("RGB", (60, 30 + i), (200, 100, 0)).save(tmp_path / "in" / name)
    (tmp_path / "in/broken.jpg").write_bytes(b"\xff\xd8 nothing")
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
        ("in/below", r"predict\.inputs: no file matches"),
        ("in/broken.jpg", r"predict\.inputs: none of the 1 files .* is an image"),
    ],
)
def test_nothing_to_look_at(detector, folder, pattern, message):  # noqa: F811
    with pytest.raises(InputError, match=message):
        run(detector, folder, pattern)
    assert not (folder / "out/predictions.json").exists()


def test_no_inputs(detector, tmp_path):  # noqa: F811
    with pytest.raises(InputError, match=r"predict\.inputs is empty"):
        predict_files(detector, PredictConfig(), tmp_path)


def test_inputs_are_never_replaced(detector, folder):  # noqa: F811
    before = (folder / "in/a.png").read_bytes()
    with pytest.raises(InputError, match=r"predict\.output: .*would replace .*a\.png"):
        run(detector, folder, "in/*.png", out="in")
    assert (folder / "in/a.png").read_bytes() == before
