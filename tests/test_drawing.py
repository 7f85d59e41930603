import matplotlib.font_manager
import numpy as np
import pytest
from absl import logging
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from PIL import Image

from opendet_jax import drawing
from opendet_jax.drawing import COLOUR_WORDS, colour_of, contact_sheet, draw, side_by_side
from opendet_jax.errors import InputError

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


@pytest.mark.parametrize("word", COLOUR_WORDS)
def test_a_colour_word_gives_its_colour(word):
    """Of all colour words its own is the nearest to every shade, so a yellow ring is not drawn in green."""
    shades = {colour_of(name) for i in range(200) for name in (f"{word} thing {i}", f"a {word.upper()}-{i} one")}
    assert len(shades) > 10
    anchors = np.array(list(COLOUR_WORDS.values()))
    for shade in shades:
        nearest = anchors[np.abs(anchors - shade).sum(1).argmin()]
        assert tuple(nearest) == COLOUR_WORDS[word]


def test_only_whole_words_are_colours_and_the_first_counts():
    def distance(name, word):
        return np.abs(np.subtract(colour_of(name), COLOUR_WORDS[word])).max()

    assert distance("black and white cat", "black") <= 37
    assert distance("white and black cat", "white") <= 45
    assert all(distance(name, "red") > 45 for name in ("predator", "redwood", "scarred"))


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


def test_labels_of_a_crowd_do_not_cover_each_other():
    """Every label has as many pixels of its colour as it has alone; the boxes themselves are the same everywhere."""
    boxes = np.repeat(np.array([[250.0, 220.0, 330.0, 270.0]], np.float32), 12, 0)
    names = [f"{name} {number}" for number, name in enumerate(["cat", "dog", "horse"] * 4)]
    scores = np.linspace(0.9, 0.1, 12, dtype=np.float32)
    picture = np.asarray(draw(blank(), boxes, names, scores))
    for place, name in enumerate(names):
        alone = np.asarray(draw(blank(), boxes[:1], [name], scores[place : place + 1]))
        label = (alone == colour_of(name)).all(-1)[:220].sum()
        assert (picture == colour_of(name)).all(-1).sum() > 0.9 * label


@pytest.mark.parametrize(("height", "width"), [(60, 60), (40, 60), (60, 25)])
def test_on_a_tiny_picture_a_name_is_still_written_out(height, width):
    """Whole, in letters of 12 pixels at least."""
    box = np.array([[2, 2, 20, 20]], np.float32)
    picture = draw(blank(width, height), box, ["red star"], np.array([0.5], np.float32), line_width=1)
    label = (np.asarray(picture) == colour_of("red star")).all(-1)
    assert label[: 2 * 8].any(1).sum() >= 12  # over the box
    assert label.sum(1).max() > drawing._length("red star 0.50", 12)


def test_line_width_and_font_size():
    def drawn(**settings):
        picture = np.asarray(draw(blank(), BOX, ["cat"], **settings))
        coloured = (picture == colour_of("cat")).all(-1)
        return int(coloured[200, 20:120].sum()), int(coloured[:30, 30].sum())  # of the edge, of the label

    line, label = drawn()
    assert drawn(line_width=7) == (7, label)
    assert drawn(font_size=10)[0] == line
    assert drawn(font_size=10)[1] < label < drawn(font_size=20)[1]
    for setting in ({"line_width": 0}, {"font_size": -3}):
        with pytest.raises(InputError, match=r"is a whole number of pixels from 1 on, not (0|-3)$"):
            draw(blank(), BOX, ["cat"], **setting)


def font_of_a_square(path, characters):
    """A font in which every one of the characters is a black square."""
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", "square"])
    builder.setupCharacterMap({ord(character): "square" for character in characters})
    pen = TTGlyphPen(None)
    pen.moveTo((100, 0))
    for corner in ((100, 800), (900, 800), (900, 0)):
        pen.lineTo(corner)
    pen.closePath()
    builder.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "square": pen.glyph()})
    builder.setupHorizontalMetrics({".notdef": (1000, 0), "square": (1000, 100)})
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({"familyName": "Square", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)


@pytest.fixture
def fonts(tmp_path, monkeypatch):
    """Writes the files of a system that has these fonts alone: one with 日 and 本, a damaged one, one of nothing."""
    caches = (drawing._font_with, drawing._system_characters, drawing._drawable)
    files = []
    monkeypatch.setattr(matplotlib.font_manager, "findSystemFonts", lambda: [str(path) for path in files])
    for cache in caches:
        cache.cache_clear()

    def install():
        files.extend(tmp_path / name for name in ("A-Sans-Bold.ttf", "LastResort.ttf", "Kanji.ttf"))
        files[0].write_bytes(b"damaged")
        font_of_a_square(files[1], "日本猫")
        font_of_a_square(files[2], "日本")
        for cache in caches:
            cache.cache_clear()
        return files

    yield install
    for cache in caches:
        cache.cache_clear()


def test_characters_that_the_shipped_font_lacks_come_from_a_font_of_the_system(fonts, caplog):
    logging.use_absl_handler()
    kanji = str(fonts()[2])
    assert [drawing._font_with(character) == kanji for character in "日a本"] == [True, False, True]
    picture = draw(blank(), BOX, ["日 a 本"])
    assert changed(draw(blank(), BOX, ["□ a □"]), picture)[:30].any()
    assert caplog.text == ""


def test_a_name_that_no_font_can_draw_is_said_once(fonts, caplog):
    logging.use_absl_handler()
    fonts()
    for _ in range(3):
        draw(blank(), BOX, ["日猫🐈 a"])
    assert caplog.text.count("no font of this system has 猫, 🐈 of '日猫🐈 a': drawn as □") == 1


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
