import numpy as np
import pytest
from PIL import Image

from opendet_jax.drawing import colour_of, contact_sheet, draw, side_by_side

BOX = np.array([[20.0, 30.0, 220.0, 330.0]], np.float32)


def blank(width=600, height=500):
    return Image.new("RGB", (width, height), (128, 128, 128))


def changed(before, after):
    return (np.asarray(before) != np.asarray(after)).any(-1)


def test_colours_are_stable_and_mostly_distinct():
    assert colour_of("cat") == colour_of("cat")
    names = [f"name {i}" for i in range(200)]
    assert len({colour_of(name) for name in names}) > 180
    for name in names:
        assert np.dot(colour_of(name), (0.299, 0.587, 0.114)) >= 88


def test_the_box_is_where_it_is():
    picture = draw(blank(), BOX, ["cat"], np.array([0.9], np.float32))
    pixels = np.asarray(picture)
    assert picture.size == (600, 500)
    for x, y in ((20, 200), (219, 200), (100, 329)):
        assert tuple(pixels[y, x]) == colour_of("cat")
    assert not changed(blank(), picture)[50:320, 40:200].any()
    assert not changed(blank(), picture)[340:, 240:].any()
    assert not changed(blank(), draw(blank(), BOX[:0], [])).any()


def test_the_input_stays():
    image = blank()
    draw(image, BOX, ["cat"])
    assert not changed(blank(), image).any()


def test_small_pictures_are_enlarged_by_a_whole_number():
    assert draw(blank(100, 50), BOX / 10, ["cat"]).size == (500, 250)
    assert draw(Image.new("L", (1, 1)), BOX[:0], []).size == (480, 480)


@pytest.mark.parametrize("corner", [(0, 0), (560, 0), (0, 460), (560, 460), (-50, -50), (590, 490)])
def test_labels_stay_in_the_picture(corner):
    """A label is a filled rectangle; cut off at the border it would be smaller than in the middle."""
    box = np.array([[*corner, corner[0] + 40, corner[1] + 40]], np.float32)
    middle = np.array([[300, 300, 340, 340]], np.float32)

    def label_size(where):
        pixels = np.asarray(draw(blank(), where, ["kangaroo"], np.array([0.5], np.float32)))
        plain = (pixels == colour_of("kangaroo")).all(-1)
        rows = plain.sum(1)
        return rows.max()

    assert label_size(box) >= label_size(middle) - 1


def test_labels_avoid_each_other():
    boxes = np.repeat(BOX, 3, 0)
    names = ["cat", "dog", "bird"]
    picture = np.asarray(draw(blank(), boxes, names, np.array([0.9, 0.8, 0.7], np.float32)))
    alone = [np.asarray(draw(blank(), BOX, [name], np.array([0.9], np.float32))) for name in names]
    for name, single in zip(names, alone, strict=True):
        wanted = (single == colour_of(name)).all(-1)[:30].sum()
        assert (picture == colour_of(name)).all(-1).sum() > 0.9 * wanted


def test_any_name_can_be_drawn():
    names = ["", "two\nlines", "日本 naïve ß", "x" * 500]
    boxes = np.array([[10, 10 + 90 * i, 60, 80 + 90 * i] for i in range(4)], np.float32)
    assert draw(blank(), boxes, names, np.ones(4, np.float32)).size == (600, 500)


def test_contact_sheet():
    pictures = [blank(100, 50 + 10 * i) for i in range(5)]
    sheet = contact_sheet(pictures, columns=2)
    assert sheet.size == (2 * 100 + 3 * 8, 8 + (60 + 8) + (80 + 8) + (90 + 8))
    assert contact_sheet(pictures * 4, columns=4, width=150).width <= 150
    assert contact_sheet(pictures[:1], columns=3).size == (116, 66)
    with pytest.raises(ValueError, match="got 0 and 2"):
        contact_sheet([], 2)


def test_side_by_side():
    pair = side_by_side(blank(200, 100), blank(200, 100), ("truth", "prediction"))
    assert pair.width == 408
    assert (np.asarray(pair)[-100:, :200] == 128).all()
    assert (np.asarray(pair)[-100:, 208:] == 128).all()
    assert (np.asarray(pair)[:-100] < 100).any()
