"""Decoding whatever an image file holds, and taking whatever a caller calls an image."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from absl import logging
from PIL import Image

from opendet_jax.data.formats.records import Dataset, Record, Stored
from opendet_jax.data.images import ImageError, check_present, load_image, open_record, read_image

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


GREY = np.repeat(RGB[..., :1], 3, axis=2)
ALPHA = np.concatenate([np.full((6, 4, 1), 255, np.uint8), np.zeros((6, 5, 1), np.uint8)], axis=1)
RGBA, GREY_ALPHA = np.concatenate([RGB, ALPHA], axis=2), np.concatenate([RGB[..., :1], ALPHA], axis=2)
BLACK_OR_WHITE = RGB[..., 0] > 127


def on_white(pixels):
    return np.where(ALPHA > 0, pixels, 255)


@pytest.mark.parametrize(
    ("given", "wanted"),
    {
        "bytes": (RGB, RGB),
        "grey": (RGB[..., 0], GREY),
        "grey, one channel": (RGB[..., :1], GREY),
        "alpha": (RGBA, on_white(RGB)),
        "grey and alpha": (GREY_ALPHA, on_white(GREY)),
        "float64": (RGB / 255, RGB),
        "float32, big-endian": ((RGB / 255).astype(">f4"), RGB),
        "float16": ((RGB / 255).astype(np.float16), RGB),
        "grey float": (RGB[..., 0] / 255, GREY),
        "float with alpha": (RGBA / 255, on_white(RGB)),
        "a little over": (RGB / 255 * 1.0005, RGB),
        "a little under": (RGB / 255 - 0.0005, RGB),
        "black float": (np.zeros((6, 9, 3)), np.zeros((6, 9, 3))),
        "bool": (BLACK_OR_WHITE, np.repeat(BLACK_OR_WHITE[..., None], 3, 2) * 255),
        "mirrored and turned round": (RGB[:, ::-1, ::-1], RGB[:, ::-1, ::-1].copy()),
        "every other": (RGB[::2, 1::3], RGB[::2, 1::3].copy()),
        "Fortran's order": (np.asfortranarray(RGBA), on_white(RGB)),
        "a view of channels first": (np.ascontiguousarray(np.moveaxis(RGB, 2, 0)).transpose(1, 2, 0), RGB),
        "jax": (jnp.asarray(RGB), RGB),
        "jax float": (jnp.asarray(RGB) / 255, RGB),
        "tensor": (torch.from_numpy(RGB.copy()), RGB),
        "tensor, float": (torch.from_numpy(RGB.copy()) / 255, RGB),
        "tensor, permuted": (torch.from_numpy(np.moveaxis(RGB, 2, 0).copy()).permute(1, 2, 0), RGB),
        "three rows": (RGB[:3], RGB[:3]),
        "a read-only one": (np.frombuffer(RGB.tobytes(), np.uint8).reshape(RGB.shape), RGB),
    }.values(),
)
def test_arrays_of_any_kind(given, wanted):
    before = np.asarray(given).copy()
    pixels = load_image(given)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, wanted)
    np.testing.assert_array_equal(np.asarray(given), before)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "HSV", "F"])
def test_a_picture_of_pillow_of_any_mode(mode):
    picture = Image.new("F", (9, 6), 0.8) if mode == "F" else Image.new("RGB", (9, 6), (204, 204, 204))
    if mode in ("La", "RGBa"):
        picture = picture.convert({"La": "LA", "RGBa": "RGBA"}[mode])
    pixels = load_image(picture.convert("LA").convert("PA") if mode == "PA" else picture.convert(mode))
    assert pixels.shape == (6, 9, 3)
    assert (abs(pixels.mean() - 204) <= 2) or mode == "1"


LAST = r"; the channels come last: image\.permute\(1, 2, 0\) of a tensor, np\.moveaxis"


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (RGB.astype(np.int64), TypeError, r"not int64; image\.astype\(np\.uint8\) where its numbers are 0…255"),
        (RGB.astype(">u2"), TypeError, r"not uint16; .*\(image >> 8\)"),
        (RGB.astype(np.complex64), TypeError, r"uint8 \(0…255\), float \(0…1\) or bool, not complex64$"),
        (RGB.astype(object), TypeError, "not object$"),
        (jnp.asarray(RGB, jnp.bfloat16), TypeError, "not bfloat16$"),
        (RGB.astype(np.float32), ImageError, r"floats from \d+ to 24\d, and floats go from 0 to 1: .*image\.astype"),
        (RGB / 255 - 0.45, ImageError, r"floats from -0\.4\S* to 0\.5\S*, and floats go from 0 to 1"),
        (RGB / 255 * 1e300, ImageError, r"and floats go from 0 to 1"),
        (RGB / 255 / 255, ImageError, r"at most 0\.0038\S*, less than a quarter of 0 … 1"),
        (np.where(RGB > 100, np.nan, 0.5), ImageError, "not finite"),
        (np.where(RGB > 100, np.inf, 0.5), ImageError, "not finite"),
        (np.moveaxis(RGB, 2, 0), ValueError, r"not \(3, 6, 9\)" + LAST),
        (np.zeros((4, 60, 90), np.float32), ValueError, r"not \(4, 60, 90\)" + LAST),
        (torch.zeros((1, 60, 90)), ValueError, r"not \(1, 60, 90\)" + LAST),
        (np.zeros((8, 60, 90), np.uint8), ValueError, r"not \(8, 60, 90\); several go in a list$"),
        (torch.zeros((2, 3, 60, 90)), ValueError, r"not \(2, 3, 60, 90\); several go in a list$"),
        (np.zeros(7, np.uint8), ValueError, r"not \(7,\)"),
        (np.zeros((0, 5, 3)), ValueError, "empty"),
        (torch.zeros((6, 9, 3), requires_grad=True), TypeError, r"^NumPy can make no array of the image: .*detach"),
        (torch.zeros((6, 9, 3), dtype=torch.bfloat16), TypeError, "^NumPy can make no array of the image: .*BFloat16"),
    ],
)
def test_arrays_that_are_refused(given, error, message):
    with pytest.raises(error, match=message):
        load_image(given)


@pytest.mark.parametrize(
    "address",
    ["https://example.org/a.jpg", "HTTP://a/b", "s3://bucket/a.png", "file:///a.png", "data:image/png;base64,"],
)
def test_addresses_are_refused(address):
    for given in (address, Path(address)):
        with pytest.raises(
            ImageError, match=r"^\S+: is an address; load it yourself and give the file or its content$"
        ):
            load_image(given)


def test_a_file_called_like_an_address(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved(Path(), Image.fromarray(RGB), "https.png")
    np.testing.assert_array_equal(load_image("https.png"), RGB)
