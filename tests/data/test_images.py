"""Decoding whatever an image file holds."""

import numpy as np
import pytest
from PIL import Image

from opendet_jax.data.formats.records import Record
from opendet_jax.data.images import ImageError, open_record, read_image

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)


def saved(tmp_path, image, name="a.png", **options):
    path = tmp_path / name
    image.save(path, **options)
    return path


def test_rgb(tmp_path):
    np.testing.assert_array_equal(read_image(saved(tmp_path, Image.fromarray(RGB))), RGB)


def test_grey(tmp_path):
    expected = np.repeat(RGB[..., :1], 3, axis=2)
    np.testing.assert_array_equal(read_image(saved(tmp_path, Image.fromarray(RGB[..., 0]))), expected)


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    values = RGB[..., 0].astype(np.uint16) * 257
    expected = np.repeat(RGB[..., :1], 3, axis=2)
    np.testing.assert_array_equal(read_image(saved(tmp_path, Image.fromarray(values))), expected)


def test_cmyk(tmp_path):
    flat = Image.new("RGB", (32, 16), (200, 60, 40))
    pixels = read_image(saved(tmp_path, flat.convert("CMYK"), "a.jpg", quality=100))
    assert pixels.shape == (16, 32, 3)
    assert np.abs(pixels.astype(int) - (200, 60, 40)).max() <= 4


def test_transparent_parts_are_white(tmp_path):
    alpha = np.zeros((6, 9), np.uint8)
    alpha[:, :4] = 255
    pixels = read_image(saved(tmp_path, Image.fromarray(np.dstack([RGB, alpha]))))
    np.testing.assert_array_equal(pixels[:, :4], RGB[:, :4])
    assert (pixels[:, 4:] == 255).all()


def test_palette_with_transparency(tmp_path):
    indices = Image.fromarray(np.arange(4, dtype=np.uint8).reshape(2, 2), mode=None).convert("P")
    indices.putpalette([10, 20, 30] * 4)
    pixels = read_image(saved(tmp_path, indices, transparency=0))
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert pixels[1, 1].tolist() == [10, 20, 30]


@pytest.mark.parametrize(("orientation", "turned"), [(3, np.rot90(RGB, 2)), (6, np.rot90(RGB, -1)), (8, np.rot90(RGB))])
def test_turned_upright_by_exif(tmp_path, orientation, turned):
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(read_image(saved(tmp_path, Image.fromarray(RGB), exif=exif)), turned)


def test_missing_file(tmp_path):
    with pytest.raises(ImageError, match=r"none\.jpg: no such image"):
        read_image(tmp_path / "none.jpg")


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
@pytest.mark.parametrize("kept", [0.0, 0.02, 0.5])
def test_damaged_file(tmp_path, name, kept):
    noise = Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    path = saved(tmp_path, noise, name)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ImageError, match=name):
        read_image(path)


def test_folder_and_text_are_not_images(tmp_path):
    with pytest.raises(ImageError):
        read_image(tmp_path)
    (tmp_path / "a.jpg").write_text("not an image")
    with pytest.raises(ImageError, match=r"a\.jpg: is not an image"):
        read_image(tmp_path / "a.jpg")


def test_record_of_another_size(tmp_path):
    path = saved(tmp_path, Image.fromarray(RGB))
    record = Record(1, path, 6, 9, np.zeros((0, 4), np.float32), (), np.zeros(0, np.int64))
    with pytest.raises(ImageError, match=r"a\.png: is 9×6, its annotations say 6×9"):
        open_record(record)
