"""Decoding whatever an image file holds."""

import numpy as np
import pytest
from absl import logging
from PIL import Image

from opendet_jax.data.formats.records import Dataset, Record, Stored
from opendet_jax.data.images import ImageError, check_present, open_record, read_image

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


def data_set(folder, names, stored=None):
    records = [
        Record(i, folder / name, 9, 6, np.zeros((0, 4), np.float32), (), np.zeros(0, np.int64), stored)
        for i, name in enumerate(names)
    ]
    return Dataset(folder / "a.json", tuple(records), ())


def test_pictures_that_are_there(tmp_path, caplog):
    logging.use_absl_handler()
    saved(tmp_path, Image.fromarray(RGB))
    check_present(data_set(tmp_path, ["a.png"] * 3), "data.train", 0.0)
    check_present(data_set(tmp_path, []), "data.train", 0.0)
    check_present(data_set(tmp_path, ["not a file"], Stored({}, 0)), "data.train", 0.0)
    assert caplog.text == ""


@pytest.mark.parametrize("max_missing", [0.0, 0.01, 0.49])
def test_too_many_missing_pictures_are_an_error(tmp_path, max_missing):
    saved(tmp_path, Image.fromarray(RGB))
    with pytest.raises(ImageError) as error:
        check_present(data_set(tmp_path, ["a.png"] * 8 + [f"{i}.png" for i in range(8)]), "data.train", max_missing)
    message = f"config.data.train.images: 8 of the 16 pictures of {tmp_path}/a.json are not there; in {tmp_path} are "
    assert str(error.value).startswith(message + "missing: 0.png, 1.png, 2.png, 3.png, 4.png, …")


@pytest.mark.parametrize(("there", "missing", "max_missing"), [(8, 8, 0.5), (8, 1, 0.01), (1, 1, 0.001)])
def test_few_missing_pictures_are_a_warning(tmp_path, there, missing, max_missing, caplog):
    logging.use_absl_handler()
    saved(tmp_path, Image.fromarray(RGB))
    names = ["a.png"] * there + [f"{i}.png" for i in range(missing)]
    check_present(data_set(tmp_path, names), "data.mixture[0]", max_missing)
    assert f"config.data.mixture[0].images: {missing} of the {there + missing} pictures" in caplog.text


def test_a_single_picture_that_is_missing(tmp_path):
    with pytest.raises(ImageError, match=r"1 of the 1 pictures .* missing: a\.png"):
        check_present(data_set(tmp_path, ["a.png"]), "data.eval", 0.5)
    saved(tmp_path, Image.fromarray(RGB), "b.png")
    with pytest.raises(ImageError, match=r"1 of the 2 pictures .* missing: a\.png"):
        check_present(data_set(tmp_path, ["a.png", "b.png"]), "data.eval", 0.0)


def test_of_many_pictures_a_sample_is_looked_for(tmp_path):
    with pytest.raises(ImageError, match=r"10,000 of the 10,000 looked for, of 30,000, pictures of .* 0\.png, 3\.png"):
        check_present(data_set(tmp_path, [f"{i}.png" for i in range(30_000)]), "data.train", 0.5)


def unpack(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


@pytest.mark.parametrize(
    ("on_disk", "name", "reason"),
    [
        ([], "train/a.jpg", "there is no folder images/train in {root}"),
        (["images/b.txt"], "train/a.jpg", "there is no folder train in {root}/images"),
        (["images/train2017.zip"], "a.jpg", "{root}/images/train2017.zip is there: has it been unpacked?"),
        (["images/A.JPG"], "a.jpg", "A.JPG is there, which is spelled otherwise"),
        (["images/e\u0301.jpg"], "\u00e9.jpg", "e\u0301.jpg is there, which is spelled otherwise"),
        (["images/x/y/a.jpg"], "a.jpg", "{root}/images/x/y/a.jpg has its name: is this the folder?"),
        (["images/c.jpg", "a.jpg"], "a.jpg", "{root}/a.jpg has its name: is this the folder?"),
        (["images/c.jpg", "photos/a.jpg"], "a.jpg", "{root}/photos/a.jpg has its name: is this the folder?"),
    ],
)
def test_why_pictures_are_missing(tmp_path, on_disk, name, reason):
    unpack(tmp_path, *on_disk)
    with pytest.raises(ImageError) as error:
        check_present(data_set(tmp_path / "images", [name]), "data.train", 0.01)
    assert str(error.value).endswith("; " + reason.format(root=tmp_path)), error.value


def test_an_empty_folder(tmp_path):
    (tmp_path / "images").mkdir()
    with pytest.raises(ImageError, match=f"{tmp_path}/images is empty$"):
        check_present(data_set(tmp_path / "images", ["a.jpg"]), "data.train", 0.01)
