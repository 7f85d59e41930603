"""Boxes with names on pictures, and sheets of pictures."""

import colorsys
import math
import zlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont

SMALLEST_SIDE = 480  # pixels; a smaller picture is enlarged until its longer side has them, so that names are readable
LONGEST_LABEL = 0.5  # of the picture's width
DARKEST = 90  # luminance of 255; pure blue would be lost on a dark picture
GAP = 8
BACKGROUND = (250, 250, 250)
Colour = tuple[int, int, int]


def colour_of(name: str) -> Colour:
    """The same strong colour for the same name, in every picture and every run."""
    number = zlib.crc32(name.encode())
    hue = (number % 997) / 997
    saturation, value = 0.65 + 0.35 * (number // 997 % 3) / 2, 0.8 + 0.2 * (number // 2991 % 2)
    rgb = np.array(colorsys.hsv_to_rgb(hue, saturation, value)) * 255
    lacking = max(0.0, DARKEST - _luminance(rgb))
    red, green, blue = np.round(rgb + (255 - rgb) * lacking / (255 - _luminance(rgb))).astype(int).tolist()
    return red, green, blue


def _luminance(colour: Colour | np.ndarray) -> float:
    return float(np.dot(colour, (0.299, 0.587, 0.114)))


def _ink_on(colour: Colour) -> Colour:
    return (0, 0, 0) if _luminance(colour) > 130 else (255, 255, 255)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    import matplotlib  # slow, and needed here alone: it ships DejaVu Sans, which has the letters of most alphabets

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans-Bold.ttf"), size)


def _fitted(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """The text on one line, its end replaced by … where it is wider than `width` pixels."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def _overlap(a: Sequence[float], b: Sequence[float]) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _label_place(
    box: Sequence[float], size: tuple[int, int], picture: tuple[int, int], taken: list[tuple[float, ...]]
) -> tuple[float, float, float, float]:
    """Where the label covers other labels least: over the box, inside at its top or bottom, or under it."""
    width, height = map(float, size)
    places = []
    for top in (box[1] - height, box[1], box[3] - height, box[3]):
        for left in (box[0], box[2] - width):
            x = min(max(left, 0.0), max(picture[0] - width, 0.0))
            y = min(max(top, 0.0), max(picture[1] - height, 0.0))
            places.append((x, y, x + width, y + height))
    return min(places, key=lambda place: sum(_overlap(place, other) for other in taken))


def draw(
    image: Image.Image,
    boxes: Float[np.ndarray, "n 4"],
    names: Sequence[str],
    scores: Float[np.ndarray, " n"] | None = None,
) -> Image.Image:
    """A copy of the picture with its boxes (x0, y0, x1, y1 in pixels), best last so that it lies on top.

    Small pictures come back enlarged by a whole number.
    """
    factor = max(1, math.ceil(SMALLEST_SIDE / max(image.size)))
    picture = image.convert("RGB").resize((image.width * factor, image.height * factor), Image.Resampling.BICUBIC)
    canvas = ImageDraw.Draw(picture)
    side = math.sqrt(picture.width * picture.height)
    line = max(2, round(side / 250))
    font = _font(max(12, round(side / 42)))
    pad = max(2, line)
    text_height = sum(font.getmetrics())
    order = list(range(len(boxes))) if scores is None else np.argsort(-scores, kind="stable").tolist()
    scaled = (boxes * factor).tolist()
    for place in order[::-1]:
        x0, y0, x1, y1 = scaled[place]
        edge = (x0, y0, max(x1 - 1, x0), max(y1 - 1, y0))
        canvas.rectangle(edge, outline=(0, 0, 0), width=line + 1)
        canvas.rectangle(edge, outline=colour_of(names[place]), width=line)
    taken: list[tuple[float, ...]] = []
    labels = []
    for place in order:
        score = "" if scores is None else f" {scores[place]:.2f}"
        name = _fitted(names[place] or "?", font, LONGEST_LABEL * picture.width - 2 * pad - font.getlength(score))
        size = (math.ceil(font.getlength(name + score)) + 2 * pad, text_height + pad)
        taken.append(_label_place(scaled[place], size, picture.size, taken))
        labels.append((taken[-1], name + score, colour_of(names[place])))
    for rectangle, text, colour in reversed(labels):
        canvas.rectangle(rectangle, fill=colour)
        canvas.text((rectangle[0] + pad, rectangle[1] + pad // 2), text, fill=_ink_on(colour), font=font)
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
    font = _font(max(14, round(picture.width / 32)))
    band = round(1.6 * font.size)
    result = Image.new("RGB", (picture.width, band + picture.height), BACKGROUND)
    place = (2, round(0.2 * font.size))
    ImageDraw.Draw(result).text(place, _fitted(title, font, picture.width - 4.0), fill=(40, 40, 40), font=font)
    result.paste(picture, (0, band))
    return result


def side_by_side(left: Image.Image, right: Image.Image, titles: tuple[str, str]) -> Image.Image:
    """Two pictures of one size next to each other, each under its title."""
    parts = [titled(picture, title) for picture, title in zip((left, right), titles, strict=True)]
    pair = Image.new("RGB", (left.width + GAP + right.width, max(part.height for part in parts)), BACKGROUND)
    for x, part in zip((0, left.width + GAP), parts, strict=True):
        pair.paste(part, (x, 0))
    return pair
