"""Every mode that Pillow can open, turned every way. tests/data/test_damaged_pictures.py damages them."""

import io
import itertools
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from opendet_jax.data import pixels
from opendet_jax.data.formats.records import Record
from opendet_jax.data.images import load_image, open_record
from opendet_jax.data.pixels import MAX_PIXELS, ImageError, decode, upright_size

HEIGHT, WIDTH = 12, 20
RNG = np.random.default_rng(0)
SMOOTH = Image.fromarray(RNG.integers(0, 256, (2, 3, 3), dtype=np.uint8)).resize((WIDTH, HEIGHT), 2)
RGB = np.asarray(SMOOTH)
GREY = np.asarray(SMOOTH.convert("L"))
ALPHA = np.linspace(0, 255, WIDTH).astype(np.uint8) * np.ones((HEIGHT, 1), np.uint8)
WIDE = np.linspace(0, 65535, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(np.uint16)


def on_white(colours):
    opacity = ALPHA[..., None] / 255
    return colours * opacity + 255 * (1 - opacity)


def grey(values):
    return np.repeat(values[..., None], 3, axis=2)


def sixteen_bits(mode):
    return Image.frombytes(mode, (WIDTH, HEIGHT), WIDE.astype(">u2" if mode.endswith("B") else "<u2").tobytes())


def with_alpha(mode):
    image = SMOOTH.convert("L" if mode == "LA" else "P" if mode == "PA" else "RGB").convert(mode)
    image.putalpha(Image.fromarray(ALPHA))
    return image


def lab():
    profiles = (ImageCms.createProfile(name) for name in ("sRGB", "LAB"))
    return ImageCms.applyTransform(SMOOTH, ImageCms.buildTransform(*profiles, "RGB", "LAB"))


PALETTE = np.asarray(SMOOTH.convert("P").convert("RGB"))
MODES = {  # a picture of every mode, the RGB that it is, and by how much Pillow's conversion may be off
    "1": (SMOOTH.convert("1"), grey(np.asarray(SMOOTH.convert("1")) * 255), 0),
    "L": (SMOOTH.convert("L"), grey(GREY), 0),
    "LA": (with_alpha("LA"), on_white(grey(GREY)), 1),
    "La": (with_alpha("LA").convert("La"), on_white(grey(GREY)), 2),
    "I": (Image.fromarray(WIDE.astype(np.int32)), grey(WIDE >> 8), 0),
    "I;16": (sixteen_bits("I;16"), grey(WIDE >> 8), 0),
    "I;16L": (sixteen_bits("I;16L"), grey(WIDE >> 8), 0),
    "I;16B": (sixteen_bits("I;16B"), grey(WIDE >> 8), 0),
    "I;16N": (sixteen_bits("I;16N"), grey(WIDE >> 8), 0),
    "F": (Image.fromarray((WIDE / 65535).astype(np.float32)), grey(np.rint(WIDE / 65535 * 255)), 0),
    "P": (SMOOTH.convert("P"), PALETTE, 0),
    "PA": (with_alpha("PA"), on_white(PALETTE), 1),
    "RGB": (SMOOTH, RGB, 0),
    "RGBX": (SMOOTH.convert("RGBX"), RGB, 0),
    "RGBA": (with_alpha("RGBA"), on_white(RGB), 1),
    "RGBa": (with_alpha("RGBA").convert("RGBa"), on_white(RGB), 2),
    "CMYK": (SMOOTH.convert("CMYK"), RGB, 0),
    "YCbCr": (SMOOTH.convert("YCbCr"), RGB, 3),
    "HSV": (SMOOTH.convert("HSV"), RGB, 6),
    "LAB": (lab(), RGB, 16),
}


def test_every_mode_of_pillow_is_here_and_in_the_documentation():
    assert MODES.keys() == {*Image.MODES}
    assert all(image.mode == mode for mode, (image, _, _) in MODES.items())
    text = (Path(__file__).parents[2] / "docs/data.md").read_text()
    table = text[text.index("| Pillow's mode") :].split("\n\n")[0]
    assert {mode for row in table.splitlines()[2:] for mode in re.findall("`([^`]+)`", row.split("|")[1])} == {*MODES}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode(mode):
    image, expected, off = MODES[mode]
    found = load_image(image).astype(np.float64)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=off)


# Numbers of more than 8 bits.


def tiff(values, bits, sample_format, photometric=1, order="<", tags=(), size=(WIDTH, HEIGHT)):
    """A grey TIFF of these bytes, as other programs write it; tags are (tag, type, count, four bytes)."""
    numbers = {256: size[0], 257: size[1], 258: bits, 262: photometric, 277: 1, 278: size[1], 279: len(values)}
    numbers[339] = sample_format
    shorts = (258, 262, 277, 339)
    entries = [
        (tag, 3, 1, struct.pack(f"{order}HH", number, 0))
        if tag in shorts
        else (tag, 4, 1, struct.pack(f"{order}L", number))
        for tag, number in numbers.items()
    ] + list(tags)
    place = 8 + 2 + 12 * (len(entries) + 1) + 4
    entries = sorted([*entries, (273, 4, 1, struct.pack(f"{order}L", place))], key=lambda entry: entry[0])
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}LH", 8, len(entries))
    return head + b"".join(struct.pack(f"{order}HHL", *entry[:3]) + entry[3] for entry in entries) + bytes(4) + values


def ramp(kind, most, least=0):
    return np.linspace(least, most, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(kind)


def packed_twelve_bits():
    pairs = ramp(np.int64, 4095).reshape(-1, 2)
    first, second = pairs.T
    return np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], 1).astype(np.uint8).tobytes()


def decoded(content):
    return np.asarray(decode(io.BytesIO(content), "a.tif").image)


@pytest.mark.parametrize(
    ("content", "falling"),
    [
        (tiff(ramp("<u2", 65535).tobytes(), 16, 1), False),
        (tiff(ramp(">u2", 65535).tobytes(), 16, 1, order=">"), False),
        (tiff(ramp("<u2", 65535).tobytes(), 16, 1, photometric=0), True),
        (tiff(ramp("<i2", 32767).tobytes(), 16, 2), False),
        (tiff(packed_twelve_bits(), 12, 1), False),
        (tiff(ramp("<u4", 2**32 - 1).tobytes(), 32, 1), False),
        (tiff(ramp("<i4", 2**31 - 1).tobytes(), 32, 2), False),
        (tiff(ramp("<f4", 1).tobytes(), 32, 3), False),
        (tiff(ramp("<f4", 1).tobytes(), 32, 3, photometric=0), True),
        (tiff(ramp("i1", 127).tobytes(), 8, 2), False),
        (b"P5 20 12 65535\n" + ramp(">u2", 65535).tobytes(), False),
        (b"P5 20 12 4095\n" + ramp(">u2", 4095).tobytes(), False),
        (b"P5 20 12 100\n" + ramp("u1", 100).tobytes(), False),
        (b"Pf\n20 12\n-1.0\n" + ramp("<f4", 1)[::-1].tobytes(), False),
    ],
)
def test_numbers_that_fill_the_range_of_their_type(content, falling):
    expected = grey(ramp(np.float64, 255))
    np.testing.assert_allclose(decoded(content), 255 - expected if falling else expected, atol=3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (tiff(ramp("<u2", 4095).tobytes(), 16, 1), "from 0 to 4095, less than a quarter of the range 0 … 65,535"),
        (tiff(ramp("<u2", 255).tobytes(), 16, 1), "from 0 to 255, less than a quarter of the range 0 … 65,535"),
        (tiff(ramp("<u2", 16383, 9).tobytes(), 16, 1), "from 9 to 16383, less than a quarter of the range 0 … 65,535"),
        (tiff(ramp("<i2", 100, -100).tobytes(), 16, 2), "from -100 to 100, outside the range 0 … 32,767"),
        (tiff(ramp("<i4", 255).tobytes(), 32, 2), "from 0 to 255, less than a quarter of the range 0 … 2,147,483,647"),
        (
            tiff(ramp("<u4", 65535).tobytes(), 32, 1),
            "from 0 to 65535, less than a quarter of the range 0 … 4,294,967,295",
        ),
        (tiff(ramp("<f4", 65535).tobytes(), 32, 3), "from 0 to 65535, outside the range 0 … 1 "),
        (tiff(ramp("<f4", 255).tobytes(), 32, 3), "from 0 to 255, outside the range 0 … 1 "),
        (tiff(ramp("<f4", 1, -1).tobytes(), 32, 3), "from -1 to 1, outside the range 0 … 1 "),
        (tiff(ramp("<f4", 1 / 16).tobytes(), 32, 3), "from 0 to 0.0625, less than a quarter of the range 0 … 1 "),
        (tiff(np.full((12, 20), np.nan, "<f4").tobytes(), 32, 3), "holds numbers that are not finite"),
        (tiff(np.full((12, 20), np.inf, "<f4").tobytes(), 32, 3), "holds numbers that are not finite"),
        (tiff(ramp("i1", 127, -128).tobytes(), 8, 2), "from -128 to 127, outside the range 0 … 127"),
    ],
)
def test_numbers_whose_brightness_is_not_known_are_refused(content, message):
    with pytest.raises(ImageError) as error:
        decoded(content)
    assert str(error.value).startswith("a.tif: ")
    assert message in str(error.value)


@pytest.mark.parametrize("kind", [np.int32, np.uint16, np.float32])
def test_pictures_of_the_interface_are_refused_alike(kind):
    with pytest.raises(ImageError, match=r"^the image: holds numbers from 0 to 255"):
        load_image(Image.fromarray(ramp(kind, 255)))


@pytest.mark.parametrize("kind", [np.int32, np.uint16, np.float32])
def test_black_is_black_in_every_type(kind):
    assert not load_image(Image.fromarray(np.zeros((4, 4), kind))).any()


def test_the_transparent_grey_of_sixteen_bits_is_white(tmp_path):
    sixteen_bits("I;16").save(tmp_path / "a.png", transparency=int(WIDE[3, 4]))
    expected = grey(WIDE >> 8)
    expected[3, 4] = 255
    np.testing.assert_array_equal(load_image(tmp_path / "a.png"), expected)


@pytest.mark.parametrize("name", ["a.gif", "a.tif", "a.png", "a.webp", "a.mpo"])
def test_of_several_frames_the_first(tmp_path, name):
    first, second = Image.new("RGB", (9, 9), (250, 0, 0)), Image.new("RGB", (9, 9), (0, 0, 250))
    first.save(tmp_path / name, save_all=True, append_images=[second])
    assert np.abs(load_image(tmp_path / name).astype(int) - (250, 0, 0)).max() < 9


# Orientation.

UPRIGHT = {  # what EXIF means by each: from the pixels as they are stored
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: np.rot90(stored, 2).swapaxes(0, 1),
    8: lambda stored: np.rot90(stored),
}


def exif(order, entries, tail=b""):
    """A block of EXIF with these (tag, type, count, four bytes)."""
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}LH", 8, len(entries))
    listed = b"".join(struct.pack(f"{order}HHL", *entry[:3]) + entry[3] for entry in entries)
    return b"Exif\0\0" + head + listed + bytes(4) + tail


def written(order, number, kind):
    """The entry of an orientation in every type that may hold it; what does not fit into it lies in the first tail."""
    place = struct.pack(f"{order}L", 8 + 2 + 12 + 4)
    value, tail = {
        "byte": ((1, 1, bytes([number, 0, 0, 0])), b""),
        "text": ((2, 2, b"%d\0\0\0" % number), b""),
        "short": ((3, 1, struct.pack(f"{order}HH", number, 0)), b""),
        "shorts": ((3, 2, struct.pack(f"{order}HH", number, number)), b""),
        "long": ((4, 1, struct.pack(f"{order}L", number)), b""),
        "rational": ((5, 1, place), struct.pack(f"{order}LL", 2 * number, 2)),
        "signed byte": ((6, 1, bytes([number, 0, 0, 0])), b""),
        "undefined": ((7, 1, bytes([number, 0, 0, 0])), b""),
        "signed short": ((8, 1, struct.pack(f"{order}hH", number, 0)), b""),
        "float": ((11, 1, struct.pack(f"{order}f", number)), b""),
        "double": ((12, 1, place), struct.pack(f"{order}d", number)),
    }[kind]
    return (0x0112, *value), tail


KINDS = (
    "byte",
    "text",
    "short",
    "shorts",
    "long",
    "rational",
    "signed byte",
    "undefined",
    "signed short",
    "float",
    "double",
)


@pytest.mark.filterwarnings("ignore:Metadata Warning")
@pytest.mark.parametrize(("number", "order", "kind"), [*itertools.product(range(1, 9), "<>", KINDS)])
def test_orientations_of_every_type(tmp_path, number, order, kind):
    entry, tail = written(order, number, kind)
    content = io.BytesIO()
    SMOOTH.save(content, "PNG", exif=exif(order, [entry], tail))
    found = decode(content, "a.png")
    np.testing.assert_array_equal(np.asarray(found.image), UPRIGHT[number](RGB))
    assert found.orientation == number
    (tmp_path / "a.png").write_bytes(content.getvalue())
    assert upright_size(tmp_path / "a.png") == found.image.size


@pytest.mark.parametrize("value", [0, 9, 65535, float("nan"), 6.5, "up", b"", (), None])
def test_orientations_that_are_none(value):
    assert pixels._number(value) == 1


@pytest.mark.parametrize(
    ("number", "order", "kind"), [*itertools.product(range(1, 9), "<>", ("short", "long", "byte"))]
)
def test_orientations_of_tiffs(tmp_path, number, order, kind):
    """Which Pillow turns itself, but for bytes; and scrambles where it maps an uncompressed one by its path."""
    entry, _ = written(order, number, kind)
    content = tiff(WIDE.astype(f"{order}u2").tobytes(), 16, 1, order=order, tags=[entry])
    (tmp_path / "a.tif").write_bytes(content)
    for source in (io.BytesIO(content), tmp_path / "a.tif"):
        found = decode(source, "a.tif")
        np.testing.assert_array_equal(np.asarray(found.image), UPRIGHT[number](grey(WIDE >> 8)))
        assert found.orientation == number
    assert upright_size(tmp_path / "a.tif") == found.image.size


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize(
    "block", [b"Exif\0\0", b"Exif\0\0II*\0", b"Exif\0\0XX*\0\x08\0\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b""]
)
def test_an_orientation_of_xmp_beside_exif_that_is_none(block):
    content = io.BytesIO()
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    SMOOTH.save(content, "WEBP", lossless=True, exif=block, xmp=xmp)
    np.testing.assert_array_equal(np.asarray(decode(content, "a").image), UPRIGHT[6](RGB))


def test_the_size_is_known_without_the_pixels(tmp_path):
    """Of a PNG too, of which Pillow reads the pixels to look for metadata; where there are such, they count."""
    path = tmp_path / "a.png"
    SMOOTH.save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ImageError, match=r"a\.png: cannot be decoded"):
        load_image(path)
    assert upright_size(path) == (WIDTH, HEIGHT)
    block = exif("<", [written("<", 6, "short")[0]]).removeprefix(b"Exif\0\0")
    chunk = b"eXIf" + block
    end = whole.index(b"IEND") - 4
    late = whole[:end] + struct.pack(">L", len(block)) + chunk + struct.pack(">L", zlib.crc32(chunk)) + whole[end:]
    path.write_bytes(late)
    assert decode(path, path).image.size == upright_size(path) == (HEIGHT, WIDTH)


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n"])
def test_a_size_that_cannot_be_read(tmp_path, content):
    with pytest.raises(ImageError, match=r"a\.png: no such image"):
        upright_size(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ImageError, match=r"a\.png: its size cannot be read"):
        upright_size(tmp_path / "a.png")


def test_orientation_set_by_a_caller():
    image = SMOOTH.copy()
    image.getexif()[0x0112] = 8
    np.testing.assert_array_equal(load_image(image), UPRIGHT[8](RGB))


@pytest.mark.parametrize(
    "error", [KeyError(274), AttributeError("x"), AssertionError(), MemoryError(), RecursionError("x")]
)
def test_whatever_a_decoder_raises_is_an_error_of_the_picture(tmp_path, error, monkeypatch):
    SMOOTH.save(tmp_path / "a.png")

    def fail(*_):
        raise error

    monkeypatch.setattr(Image.Image, "load", fail)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    with pytest.raises(ImageError, match=rf"a\.png: cannot be decoded: {type(error).__name__}: "):
        load_image(tmp_path / "a.png")


# Sizes.


def record(path, width, height):
    return Record(1, path, width, height, np.zeros((0, 4), np.float32), (), np.zeros(0, np.int64))


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif"])
def test_sizes_of_the_picture_before_it_is_turned(tmp_path, name):
    turned = Image.Exif()
    turned[0x0112] = 6
    SMOOTH.save(tmp_path / name, exif=turned)
    assert open_record(record(tmp_path / name, HEIGHT, WIDTH)).size == (HEIGHT, WIDTH)
    message = rf"{name}: is 12×20, its annotations say 20×12: its EXIF \(orientation 6\) turns it upright, and the anno"
    with pytest.raises(ImageError, match=message):
        open_record(record(tmp_path / name, WIDTH, HEIGHT))


def test_sizes_of_a_picture_that_nothing_turns(tmp_path):
    SMOOTH.save(tmp_path / "a.png")
    message = r"is 20×12, its annotations say 12×20: width and height are exchanged, and no EXIF in it says"
    with pytest.raises(ImageError, match=message):
        open_record(record(tmp_path / "a.png", HEIGHT, WIDTH))


def test_the_limit_of_pixels(tmp_path):
    SMOOTH.save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    for image in (tmp_path / "a.png", content, io.BytesIO(content), Image.open(io.BytesIO(content)), SMOOTH):
        assert load_image(image, 240).shape == (12, 20, 3)
        with pytest.raises(ImageError, match=r": has 20×12 = 240 pixels, more than data\.max_pixels = 239"):
            load_image(image, 239)


def test_pillows_own_limit(tmp_path, monkeypatch):
    """By default it stays as it is; a field above the default raises it, for the process."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    assert 2 * Image.MAX_IMAGE_PIXELS == MAX_PIXELS
    Image.MAX_IMAGE_PIXELS = 100
    SMOOTH.save(tmp_path / "a.png")
    with pytest.raises(ImageError, match=r"a\.png: is too large for data\.max_pixels = 178,956,970: .*240 pixels"):
        load_image(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png", MAX_PIXELS + 1).shape == (12, 20, 3)
    assert Image.MAX_IMAGE_PIXELS == MAX_PIXELS + 1
