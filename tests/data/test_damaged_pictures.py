"""Pictures of every format and mode with damaged metadata, cut off or with changed bytes: right, or an error."""

import io
import struct

import numpy as np
import PIL
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opendet_jax.data.images import load_image
from opendet_jax.data.pixels import ImageError, decode
from tests.data.formats.test_fuzz import few as sweep
from tests.data.test_pixels import HEIGHT, KINDS, MODES, UPRIGHT, WIDE, WIDTH, exif, grey, tiff, written

YCBCR = ("YCbCr",) if int(PIL.__version__.split(".")[0]) >= 13 else ()  # Pillow 12 cannot read what it writes
FORMATS = {  # modes that a format keeps, losslessly, and the arguments of saving
    "PNG": (("1", "L", "LA", "I;16", "P", "RGB", "RGBA"), {}),
    "TIFF": (("1", "L", "LA", "I;16", "I;16B", "F", "P", "PA", "RGB", "RGBX", "RGBA", "CMYK", *YCBCR, "LAB"), {}),
    "WEBP": (("RGB", "RGBA"), {"lossless": True}),
    "JPEG": (("L", "RGB", "CMYK"), {"quality": 95}),
    "MPO": (("RGB",), {}),
    "AVIF": (("L", "RGB", "RGBA"), {}),
    "JPEG2000": (("L", "LA", "I;16", "RGB", "RGBA"), {}),
    "GIF": (("L", "P", "RGB", "RGBA"), {}),
    "BMP": (("1", "L", "P", "RGB", "RGBA"), {}),
    "PPM": (("1", "L", "I", "F", "RGB", "RGBA"), {}),
    "TGA": (("1", "L", "LA", "P", "RGB", "RGBA"), {}),
    "ICO": (("1", "L", "LA", "P", "RGB", "RGBA"), {"sizes": [(WIDTH, HEIGHT)]}),
    "SGI": (("L", "RGB", "RGBA"), {}),
    "DDS": (("L", "LA", "RGB", "RGBA"), {}),
    "QOI": (("RGB", "RGBA"), {}),
}
WITH_EXIF = ("PNG", "WEBP", "JPEG", "MPO")  # in which Pillow writes a block of EXIF as it is
STORED = [(form, mode) for form, (modes, _) in FORMATS.items() for mode in modes]
entries = st.lists(
    st.tuples(
        st.integers(0, 65535).filter(lambda tag: tag != 0x0112),
        st.integers(0, 19),
        st.sampled_from([0, 1, 2, 5, 2**20, 2**32 - 1]),
        st.binary(min_size=4, max_size=4),
    ),
    max_size=3,
)


def stored(form, mode, **options):
    content = io.BytesIO()
    MODES[mode][0].save(content, form, **FORMATS[form][1], **options)
    return content.getvalue()


def check(content, expected, where):
    """The pixels, upright, or an error that names the file."""
    (where / "a.file").write_bytes(content)
    try:
        found = load_image(where / "a.file")
    except ImageError as error:
        said = str(error)
        assert said.startswith(f"{where}/a.file: ")
        return False
    np.testing.assert_array_equal(found, expected)
    return True


@pytest.mark.filterwarnings("error")
@sweep
@given(
    st.sampled_from(STORED),
    st.integers(1, 8),
    st.sampled_from(KINDS),
    st.sampled_from("<>"),
    entries,
    entries,
    st.binary(max_size=9),
)
def test_metadata_of_any_kind(tmp_path, picture, number, kind, order, before, after, tail):
    """Beside a valid orientation nothing matters. Of formats without EXIF only the mode is tried."""
    form, mode = picture
    plain = stored(form, mode)
    upright = load_image(plain)
    if form not in WITH_EXIF:
        assert check(plain, upright, tmp_path)
        return
    entry, value = written(order, number, kind)
    place = 8 + 2 + 12 * (len(before) + 1 + len(after)) + 4
    if value:
        entry = (*entry[:3], struct.pack(f"{order}L", place))
    block = exif(order, [*before, entry, *after], value + tail)
    assert check(stored(form, mode, exif=block), UPRIGHT[number](upright), tmp_path)


@pytest.mark.filterwarnings("error")
@sweep
@given(st.integers(1, 8), st.sampled_from("<>"), entries)
def test_metadata_of_tiffs(tmp_path, number, order, others):
    """But for the tags that say how the pixels are stored."""
    others = [entry for entry in others if entry[0] > 400 or entry[0] in (270, 271, 272, 282, 283, 296, 305, 306)]
    entry, _ = written(order, number, "short")
    content = tiff(WIDE.astype(f"{order}u2").tobytes(), 16, 1, order=order, tags=[entry, *others])
    check(content, UPRIGHT[number](grey(WIDE >> 8)), tmp_path)


@pytest.mark.filterwarnings("error")
@sweep
@given(st.sampled_from(STORED), st.integers(1, 8), st.floats(0, 1), st.booleans())
def test_files_that_are_cut_off(tmp_path, picture, number, kept, with_exif):
    form, mode = picture
    with_exif = with_exif and form in WITH_EXIF
    upright = load_image(stored(form, mode))
    options = {"exif": exif("<", [written("<", number, "short")[0]])} if with_exif else {}
    content = stored(form, mode, **options)
    check(content[: int(kept * len(content))], UPRIGHT[number if with_exif else 1](upright), tmp_path)


@pytest.mark.filterwarnings("error")
@sweep
@given(st.sampled_from(STORED), st.integers(0, 400), st.binary(min_size=1, max_size=4))
def test_files_that_are_damaged(tmp_path, picture, place, damage):
    """Pixels of some kind, or an error: which bytes matter is the format's business."""
    content = stored(*picture)
    (tmp_path / "a.file").write_bytes(content[:place] + damage + content[place + len(damage) :])
    try:
        image = decode(tmp_path / "a.file", "a.file", max_pixels=10**6).image
    except ImageError as error:
        said = str(error)
        assert said.startswith("a.file: ")
    else:
        assert image.mode == "RGB"
