"""Boxes with names on pictures, and sheets of pictures."""

import colorsys
import math
import re
import zlib
from collections.abc import Sequence, Set
from functools import cache
from itertools import groupby
from pathlib import Path

import numpy as np
from absl import logging
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont

from opendet_jax.errors import InputError

SMALLEST_SIDE = 480  # pixels; a smaller picture is enlarged until its longer side has them, so that names are readable
LONGEST_LABEL = 0.5  # of the picture's longer side
DARKEST = 90  # luminance of 255; pure blue would be lost on a dark picture
SHADES = 0.18  # how far the shades of a colour word go, towards black and towards white
NO_GLYPH = "□"  # in the place of a character that no font has
GAP = 8
BACKGROUND = (250, 250, 250)
Colour = tuple[int, int, int]

COLOUR_WORDS: dict[str, Colour] = {
    "black": (50, 50, 50),
    "white": (245, 245, 245),
    "grey": (150, 150, 150),
    "gray": (150, 150, 150),
    "red": (225, 40, 40),
    "orange": (250, 140, 20),
    "yellow": (250, 220, 40),
    "green": (45, 175, 70),
    "cyan": (50, 215, 225),
    "blue": (60, 110, 250),
    "purple": (165, 75, 215),
    "violet": (165, 75, 215),
    "pink": (255, 130, 190),
    "brown": (160, 100, 50),
}
_COLOUR_WORD = re.compile(rf"\b({'|'.join(COLOUR_WORDS)})\b", re.IGNORECASE)


def colour_of(name: str) -> Colour:
    """The same strong colour for the same name, in every picture and every run.

    A name that holds a colour word, as "yellow ring", has a shade of that colour; of several words the first counts.
    """
    number = zlib.crc32(name.encode("utf-8", "surrogatepass"))
    word = _COLOUR_WORD.search(name)
    if word:
        return _towards(COLOUR_WORDS[word[1].lower()], SHADES * (number % 997 / 498 - 1))
    hue = (number % 997) / 997
    saturation, value = 0.65 + 0.35 * (number // 997 % 3) / 2, 0.8 + 0.2 * (number // 2991 % 2)
    rgb = np.array(colorsys.hsv_to_rgb(hue, saturation, value)) * 255
    lacking = max(0.0, DARKEST - _luminance(rgb))
    return _towards(rgb, lacking / (255 - _luminance(rgb)))


def _towards(colour: Colour | np.ndarray, share: float) -> Colour:
    """This share of the way to white, or to black where it is negative."""
    rgb = np.asarray(colour, np.float64)
    red, green, blue = np.round(rgb + ((255 if share > 0 else 0) - rgb) * abs(share)).astype(int).tolist()
    return red, green, blue


def _luminance(colour: Colour | np.ndarray) -> float:
    return float(np.dot(colour, (0.299, 0.587, 0.114)))


def _against(colour: Colour, limit: int) -> Colour:
    """Black, against what is darker than the limit white."""
    return (0, 0, 0) if _luminance(colour) >= limit else (255, 255, 255)


@cache
def _font(path: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size)


@cache
def _shipped_font() -> str:
    import matplotlib  # slow, and needed for its fonts alone: its DejaVu Sans has the letters of most alphabets

    return str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans-Bold.ttf")


@cache
def _font_with(character: str) -> str | None:
    """The file of a font that has it: the shipped one, or another of this system."""
    code = ord(character)
    return _shipped_font() if code in _shipped_characters() else _system_characters().get(code)


@cache
def _shipped_characters() -> Set[int]:
    return _characters(_shipped_font())


def _characters(path: str) -> Set[int]:
    from matplotlib.ft2font import FT2Font

    return FT2Font(path).get_charmap().keys()


@cache
def _system_characters() -> dict[int, str]:
    """Of each character of any font of this system the first one, upright, bold and without serifs where there is one.

    Fonts that have a picture of nothing for every character are left out.
    """
    from matplotlib.font_manager import findSystemFonts

    def order(path: str) -> tuple[bool, bool, bool, str]:
        name = Path(path).name.lower()
        return "italic" in name or "oblique" in name, "sans" not in name, "bold" not in name, path

    found: dict[int, str] = {}
    for path in sorted(findSystemFonts(), key=order):
        if re.search("lastresort|blank", Path(path).name.lower()):
            continue
        try:
            ImageFont.truetype(path, 12)
            characters = _characters(path)
        except (OSError, RuntimeError, ValueError):  # damaged, or pictures of a fixed size
            continue
        for code in characters:
            found.setdefault(code, path)
    return found


@cache
def _drawable(text: str) -> str:
    """On one line, with NO_GLYPH in the place of what no font has. That is said, once for each text."""
    text = " ".join(text.split())
    missing = [character for character in dict.fromkeys(text) if _font_with(character) is None]
    if missing:
        logging.warning("no font of this system has %s of %r: drawn as %s", ", ".join(missing), text, NO_GLYPH)
    return "".join(NO_GLYPH if character in missing else character for character in text)


def _runs(text: str, size: int) -> list[tuple[str, ImageFont.FreeTypeFont]]:
    """The parts of a drawable text, each with the font that has its characters."""
    return [("".join(part), _font(path or _shipped_font(), size)) for path, part in groupby(text, _font_with)]


def _length(text: str, size: int) -> float:
    return sum((font.getlength(part) for part, font in _runs(text, size)), start=0.0)


def _write(canvas: ImageDraw.ImageDraw, corner: tuple[float, float], text: str, size: int, ink: Colour) -> None:
    """A drawable text from its upper left corner on; its parts stand on one line, whichever their fonts."""
    x, baseline = corner[0], corner[1] + _font(_shipped_font(), size).getmetrics()[0]
    for part, font in _runs(text, size):
        canvas.text((x, baseline), part, fill=ink, font=font, anchor="ls")
        x += font.getlength(part)


def _fitted(text: str, size: int, width: float) -> str:
    """Drawable; its end is replaced by … where it is wider than `width` pixels."""
    text = _drawable(text)
    if _length(text, size) <= width:
        return text
    while text and _length(text + "…", size) > width:
        text = text[:-1]
    return text + "…"


def _label_place(
    box: Sequence[float], size: tuple[int, int], picture: tuple[int, int], taken: Float[np.ndarray, "t 4"]
) -> Float[np.ndarray, "4"]:
    """Where the label covers other labels least, and of equal places the first.

    At its box's corners, over it, inside or under it; then anywhere along its edges; then a few lines away.
    """
    width, height = map(float, size)
    x0, y0, x1, y1 = box
    rows, columns = (y0 - height, y0, y1 - height, y1), (x0 - width, x0, x1 - width, x1)
    corners = [(x, y) for y in rows for x in columns[1:3]]
    along = [(x, y) for y in rows for x in np.arange(x0, x1 - width, width / 4)]
    beside = [(x, y) for x in columns for y in np.arange(y0, y1 - height, height / 2)]
    away = [(x, y) for line in (2, 3, 4) for y in (y0 - line * height, y1 + (line - 1) * height) for x in columns]
    for places in (corners, corners + along + beside + away):
        least = np.clip(places, 0, np.maximum(np.subtract(picture, size), 0))
        found = np.concatenate([least, least + size], axis=1)
        covered = _overlaps(found, taken).sum(axis=1)
        if covered.min() == 0:
            break
    return found[covered.argmin()]


def _overlaps(a: Float[np.ndarray, "n 4"], b: Float[np.ndarray, "t 4"]) -> Float[np.ndarray, "n t"]:
    """Common areas."""
    sides = np.minimum(a[:, None, 2:], b[None, :, 2:]) - np.maximum(a[:, None, :2], b[None, :, :2])
    return np.maximum(sides, 0).prod(axis=2)


def draw(
    image: Image.Image,
    boxes: Float[np.ndarray, "n 4"],
    names: Sequence[str],
    scores: Float[np.ndarray, " n"] | None = None,
    line_width: int | None = None,
    font_size: int | None = None,
) -> Image.Image:
    """A copy of the picture with its boxes (x0, y0, x1, y1 in pixels), best last so that it lies on top.

    Small pictures come back enlarged by a whole number. `line_width` and `font_size` are in pixels of what comes back;
    None: by its size. Raises InputError: one of them is no whole number from 1 on.
    """
    for setting, value in (("line_width", line_width), ("font_size", font_size)):
        if value is not None and (value < 1 or value != int(value)):
            raise InputError(f"{setting} is a whole number of pixels from 1 on, not {value}")
    factor = max(1, math.ceil(SMALLEST_SIDE / max(image.size)))
    picture = image.convert("RGB").resize((image.width * factor, image.height * factor), Image.Resampling.BICUBIC)
    canvas = ImageDraw.Draw(picture)
    side = math.sqrt(picture.width * picture.height)
    line = line_width or max(2, round(side / 250))
    font = font_size or max(12, round(side / 42))
    margin, pad = max(1, line // 4), max(2, font // 6)
    height = sum(_font(_shipped_font(), font).getmetrics()) + pad
    order = list(range(len(boxes))) if scores is None else np.argsort(-scores, kind="stable").tolist()
    scaled = (boxes * factor).tolist()
    for place in order[::-1]:
        x0, y0, x1, y1 = scaled[place]
        x1, y1 = max(x1 - 1, x0), max(y1 - 1, y0)
        colour = colour_of(names[place])
        around = (x0 - margin, y0 - margin, x1 + margin, y1 + margin)
        canvas.rectangle(around, outline=_against(colour, DARKEST), width=line + 2 * margin)
        canvas.rectangle((x0, y0, x1, y1), outline=colour, width=line)
    taken = np.zeros((0, 4))
    labels = []
    for place in order:
        score = "" if scores is None else f" {scores[place]:.2f}"
        room = min(LONGEST_LABEL * max(picture.size), picture.width) - 2 * pad - _length(score, font)
        name = _fitted(names[place] or "?", font, room)
        size = (math.ceil(_length(name, font) + _length(score, font)) + 2 * pad, height)
        found = _label_place(scaled[place], size, picture.size, taken)
        taken = np.concatenate([taken, found[None]])
        labels.append((found.tolist(), name, score, colour_of(names[place])))
    for rectangle, name, score, colour in reversed(labels):
        canvas.rectangle(rectangle, fill=colour)
        x, y, ink = rectangle[0] + pad, rectangle[1] + pad // 2, _against(colour, DARKEST + 40)
        _write(canvas, (x, y), name, font, ink)
        _write(canvas, (x + _length(name, font), y), score, font, ink)  # after it, in whichever direction it is written
    return picture


def contact_sheet(pictures: Sequence[Image.Image], columns: int, width: int = 1600) -> Image.Image:
    """All pictures in rows of `columns`, each as wide as its column; `width` pixels in all at most."""
    if not pictures or columns < 1:
        raise ValueError(f"a contact sheet needs pictures and columns, got {len(pictures)} and {columns}")
    columns = min(columns, len(pictures))
    cell = min((width - GAP * (columns + 1)) // columns, max(picture.width for picture in pictures))
    sized = [
        picture.resize((cell, max(1, round(picture.height * cell / picture.width))), Image.Resampling.LANCZOS)
        for picture in pictures
    ]
    rows = [sized[start : start + columns] for start in range(0, len(sized), columns)]
    height = GAP + sum(max(picture.height for picture in row) + GAP for row in rows)
    sheet = Image.new("RGB", (GAP + columns * (cell + GAP), height), BACKGROUND)
    top = GAP
    for row in rows:
        for column, picture in enumerate(row):
            sheet.paste(picture, (GAP + column * (cell + GAP), top))
        top += max(picture.height for picture in row) + GAP
    return sheet


def titled(picture: Image.Image, title: str) -> Image.Image:
    """The picture under a line of text."""
    size = max(14, round(picture.width / 32))
    band = round(1.6 * size)
    result = Image.new("RGB", (picture.width, band + picture.height), BACKGROUND)
    corner = (2.0, float(round(0.2 * size)))
    _write(ImageDraw.Draw(result), corner, _fitted(title, size, picture.width - 4.0), size, (40, 40, 40))
    result.paste(picture, (0, band))
    return result


def side_by_side(left: Image.Image, right: Image.Image, titles: tuple[str, str]) -> Image.Image:
    """Two pictures of one size next to each other, each under its title."""
    parts = [titled(picture, title) for picture, title in zip((left, right), titles, strict=True)]
    pair = Image.new("RGB", (left.width + GAP + right.width, max(part.height for part in parts)), BACKGROUND)
    for x, part in zip((0, left.width + GAP), parts, strict=True):
        pair.paste(part, (x, 0))
    return pair
