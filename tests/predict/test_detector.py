import io
import json
import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import opendet_jax
from opendet_jax.checkpoints.same_config import CheckpointError
from opendet_jax.config import DataConfig
from opendet_jax.data.images import ImageError, load_image
from opendet_jax.predict.detections import Detections
from opendet_jax.predict.detector import Detector
from tests.test_inference import CONFIG, Scripted, decode

DATA = DataConfig(eval_short_side=32, max_long_side=64, buckets=((32, 64), (64, 32)))


class Alike(Scripted):
    """Says the same of all images of a batch."""

    def encode(self, images, deterministic):
        count = len(images.pixels)
        return jax.tree.map(lambda x: jnp.repeat(x, count, axis=0), super().encode(images, deterministic))

    def decode(self, features, memory, queries):
        detected = super().decode(features, memory, queries)
        detected.prompts = detected.prompts.at[..., 0].set(0)
        return detected


@pytest.fixture(scope="module")
def detector():
    """Finds the same three objects in every image; the first two overlap."""
    params = {
        "boxes": np.array([[[0.5, 0.5, 1, 1], [0.5, 0.5, 0.96, 1], [0.25, 0.25, 0.5, 0.5]]], np.float32),
        "logits": np.array([[1.0, 3.0, -3.0]], np.float32),
        "valid": np.ones((1, 3), bool),
    }
    return Detector(Alike(), params, replace(CONFIG, data=DATA), decode)


def picture(height=40, width=80):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_one_image(detector):
    found = detector.detect(picture())
    assert isinstance(found, Detections)
    assert len(found) == 1
    np.testing.assert_allclose(found.boxes, [[0.02 * 80, 0, 0.98 * 80, 40]], rtol=1e-5)
    assert found.boxes.dtype == found.scores.dtype == np.float32
    assert found.names == ["image 0 query 1 beam 0"]
    assert found.alternatives == [["image 0 query 1 beam 1"]]
    assert found.name_scores.shape == (1, 2)


def test_settings(detector):
    assert len(detector.detect(picture(), nms_iou=1.0)) == 2
    assert len(detector.detect(picture(), min_score=0.0)) == 2
    everything = detector.detect(picture(), min_score=0.0, nms_iou=1.0)
    assert (np.diff(everything.scores) < 0).all()
    assert len(everything) == 3
    assert len(detector.detect(picture(), max_detections=2, min_score=0.0, nms_iou=1.0)) == 2
    assert len(detector.detect(picture(), min_score=1.0)) == 0


def test_every_kind_of_image_gives_the_same(detector, tmp_path):
    pixels = picture(90, 50)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    content, buffer = (tmp_path / "a.png").read_bytes(), io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")  # and stands at its end
    with (tmp_path / "a.png").open("rb") as file, (tmp_path / "a.png").open("rb", buffering=0) as unbuffered:
        images = [pixels, tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(pixels)]
        images += [content, bytearray(content), memoryview(content), buffer, file, unbuffered, jnp.asarray(pixels)]
        several = detector.detect(images)
        assert isinstance(several, list)
        for image, found in zip(images, several, strict=True):
            np.testing.assert_array_equal(load_image(image), pixels)
            assert found.to_dict() == detector.detect(image).to_dict()
            assert found.draw(image).size == found.draw(pixels).size
    assert detector.detect([]) == []


def test_grey_and_transparent_images():
    grey = picture()[..., 0]
    np.testing.assert_array_equal(load_image(grey), np.repeat(grey[..., None], 3, 2))
    np.testing.assert_array_equal(load_image(Image.fromarray(grey)), load_image(grey))
    assert (load_image(Image.new("RGBA", (4, 3), (0, 0, 0, 0))) == 255).all()


def test_images_on_their_side_are_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    Image.fromarray(picture(40, 80)).save(tmp_path / "phone.jpg", exif=exif)
    assert load_image(tmp_path / "phone.jpg").shape == (80, 40, 3)
    with Image.open(tmp_path / "phone.jpg") as image:
        assert load_image(image).shape == (80, 40, 3)


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (picture()[None], ValueError, r"not \(1, 40, 80, 3\); several go in a list"),
        (np.zeros((0, 8, 3), np.uint8), ValueError, "empty"),
        (Image.new("RGB", (0, 8)), ValueError, "empty: 0×8"),
        ("no/such/picture.jpg", ImageError, r"no/such/picture\.jpg: no such image"),
        (__file__, ImageError, r"test_detector\.py: is not an image"),
        (b"GIF89a", ImageError, r"^the image of 6 bytes: "),
        (b"", ImageError, r"^the image of 0 bytes: is not an image"),
        (io.BytesIO(b"text"), ImageError, r"^the image: is not an image"),
        (jnp.zeros((8, 8, 3), np.int32), TypeError, r"uint8.*not int32"),
        (jnp.zeros((3, 8, 8), np.uint8), ValueError, r"not \(3, 8, 8\)"),
    ],
)
def test_bad_images_are_refused(detector, image, error, message):
    with pytest.raises(error, match=message):
        detector.detect(image)


def test_other_things_are_no_images():
    """In a process of its own, without the type checks of the tests, which would be first to complain."""
    code = """
import io, pathlib
from opendet_jax.data.images import load_image
for thing in (7, None, {}, [[1]], io.StringIO("a"), open(pathlib.__file__), pathlib.Path, (x for x in "a")):
    try:
        load_image(thing)
    except TypeError as error:
        print(error)
"""
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    wanted = "an image is an array, a path, a PIL image, the bytes of a file or a file opened for bytes ('rb'), not "
    kinds = ("int", "NoneType", "dict", "list", "StringIO", "TextIOWrapper", "type", "generator")
    assert run.stdout.splitlines() == [wanted + kind for kind in kinds]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"max_detections": 0}, "max_detections is at least 1, not 0"),
        ({"min_score": 1.5}, "min_score is between 0 and 1"),
        ({"nms_iou": -0.1}, "nms_iou is between 0 and 1"),
        ({"min_score": float("nan")}, "min_score is between 0 and 1"),
    ],
)
def test_bad_settings_are_refused(detector, setting, message):
    with pytest.raises(ValueError, match=message):
        detector.detect(picture(), **setting)


@pytest.mark.parametrize("number", [2, 2.0])
def test_a_whole_number_of_detections_of_any_type(detector, number):
    assert len(detector.detect(picture(), max_detections=number, min_score=0.0, nms_iou=1.0)) == 2


def test_settings_of_another_kind():
    """In a process of its own, as above."""
    code = """
import numpy as np
from opendet_jax.config import Config
from opendet_jax.predict.detector import Detector
detector = Detector.__new__(Detector)
detector.config = Config()
detector._in_order = lambda images, selection, given, batch_size: iter([selection.max_detections])
print(repr(detector.detect(b"", np.int64(3))), repr(detector.detect(b"", np.float32(3))))
for settings in ({"max_detections": 2.5}, {"max_detections": "3"}, {"max_detections": None}, {"min_score": "0.5"}):
    try:
        detector.detect(b"", **settings)
    except TypeError as error:
        print(error)
"""
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout.splitlines() == [
        "3 3",
        "max_detections is a whole number, not 2.5",
        "max_detections is a number, not str",
        "max_detections is a number, not NoneType",
        "min_score is a number, not str",
    ]


def test_the_limit_of_pixels(detector, tmp_path):
    Image.fromarray(picture()).save(tmp_path / "a.png")
    small = Detector(Scripted(), {}, replace(CONFIG, data=replace(DATA, max_pixels=3199)), decode)
    for image in (tmp_path / "a.png", (tmp_path / "a.png").read_bytes(), Image.fromarray(picture())):
        with pytest.raises(ImageError, match=r": has 80×40 = 3,200 pixels, more than data\.max_pixels = 3,199"):
            small.detect(image)


def test_detections(detector):
    found = detector.detect(picture(), min_score=0.0, nms_iou=1.0)
    assert repr(found).splitlines() == [
        "Detections(3 objects",
        "  0.95  'image 0 query 1 beam 0'  box (2, 0, 78, 40)  also: 'image 0 query 1 beam 1'",
        "  0.73  'image 0 query 0 beam 0'  box (0, 0, 80, 40)  also: 'image 0 query 0 beam 1'",
        "  0.05  'image 0 query 2 beam 0'  box (0, 0, 40, 20)  also: 'image 0 query 2 beam 1')",
    ]
    assert repr(detector.detect(picture(), min_score=1.0)) == "Detections(0 objects)"
    as_json = json.loads(found.to_json())
    assert as_json == found.to_dict()
    assert as_json["boxes"][2] == [0.0, 0.0, 40.0, 20.0]
    assert as_json["name_scores"] == [[-1.0, -2.0]] * 3
    assert found.draw(picture()).size == (480, 240)


def test_the_package_imports_nothing_until_it_is_used():
    code = "import sys, opendet_jax; assert 'jax' not in sys.modules and opendet_jax.__version__"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names():
    for name in opendet_jax.__all__:
        assert getattr(opendet_jax, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'detector'"):
        opendet_jax.detector  # noqa: B018


def test_load_names_the_missing_folder(tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint in .*nothing_here"):
        opendet_jax.load(tmp_path / "nothing_here")
