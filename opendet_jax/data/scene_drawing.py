"""One generated scene: what its objects are called, how often, and how they are drawn.

An object is named "<colour> <shape>" or "<colour> striped <shape>": 96 names, of which 12 never occur in training
although each of their words does. Training frequencies have a long tail; val draws all 96 names equally often.
Picture i is a pure function of (seed, split, i, size).
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, UInt8
from numpy import ndarray
from PIL import Image, ImageDraw

Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = ("train", "val")

COLOURS = {
    "red": (214, 40, 40),
    "orange": (245, 140, 20),
    "yellow": (250, 220, 50),
    "green": (50, 165, 60),
    "cyan": (60, 210, 220),
    "blue": (45, 80, 215),
    "purple": (145, 55, 175),
    "white": (242, 242, 242),
}
PATTERNS = ("plain", "striped")
SHAPES = ("square", "circle", "triangle", "star", "ring", "cross")
STRIPE_COLOUR = (28, 28, 32)

MIN_OBJECTS, MAX_OBJECTS = 1, 8
MIN_SIDE, MAX_SIDE = 0.16, 0.44  # of the picture: 20 to 56 pixels at 128
MIN_VISIBLE = 0.7  # of every object's area, whatever is drawn over it later
PLACEMENT_ATTEMPTS = 30
MAX_ROTATION = math.radians(20)
MAX_STRETCH = 1.2
OVERSAMPLING = 3  # shapes are drawn this much larger and averaged down

TAIL_OFFSET, TAIL_EXPONENT = 5.0, 1.0  # weight of rank k = 0, 1, …: 1 / (k + 5)
RANKING_SEED = 3380  # a ranking of the names under which no colour, pattern or shape dominates


class Kind(NamedTuple):
    """A category: what is drawn and what it is called."""

    colour: str
    pattern: str
    shape: str

    @property
    def name(self) -> str:
        return " ".join(word for word in self if word != "plain")

    @property
    def definition(self) -> str:
        article = "an" if self.colour == "orange" else "a"
        return f"{article} {self.colour} {self.shape}" + (" with dark stripes" if self.pattern == "striped" else "")


KINDS = tuple(Kind(c, p, s) for c in COLOURS for p in PATTERNS for s in SHAPES)


def _unseen() -> frozenset[Kind]:
    """For every shape one plain and one striped colour: colour, pattern and shape are all seen in other names."""
    colours = list(COLOURS)
    plain = {Kind(colours[i], "plain", shape) for i, shape in enumerate(SHAPES)}
    striped = {Kind(colours[(i + 3) % len(colours)], "striped", shape) for i, shape in enumerate(SHAPES)}
    return frozenset(plain | striped)


UNSEEN = _unseen()


def kind_probabilities(split: Split) -> Float[ndarray, "kinds"]:
    """How likely each of `KINDS` is to be drawn: Zipf–Mandelbrot over the seen ones in training, uniform in val."""
    if split == "val":
        return np.full(len(KINDS), 1 / len(KINDS))
    seen = np.array([i for i, kind in enumerate(KINDS) if kind not in UNSEEN])
    ranking = np.random.default_rng(RANKING_SEED).permutation(seen)  # the same whatever the seed of the pictures
    weights = np.zeros(len(KINDS))
    weights[ranking] = (np.arange(len(seen)) + TAIL_OFFSET) ** -TAIL_EXPONENT
    return weights / weights.sum()


class SceneObject(NamedTuple):
    kind: int  # index in KINDS
    box: tuple[float, float, float, float]  # x, y, w, h in pixels, tight around the whole shape, hidden parts included
    area: float  # pixels of the whole shape


class _Drawing(NamedTuple):
    colour: Float[ndarray, "h w 3"]  # multiplied by alpha
    alpha: Float[ndarray, "h w 1"]
    box: tuple[float, float, float, float]  # x, y, w, h inside the drawing


def draw_scene(seed: int, split: Split, index: int, size: int) -> tuple[UInt8[ndarray, "n n 3"], list[SceneObject]]:
    """Picture `index` and its objects from back to front."""
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    canvas = _background(rng, size)
    count = rng.integers(MIN_OBJECTS, MAX_OBJECTS + 1)
    kinds = rng.choice(len(KINDS), size=count, p=kind_probabilities(split))
    objects: list[SceneObject] = []
    coverage: list[Float[ndarray, "n n 1"]] = []  # alpha of every object, less what was drawn over it
    spare: list[float] = []  # pixels of every object that may still be hidden
    for kind in kinds:
        drawing = _draw(rng, KINDS[kind], size)
        place = _place(rng, drawing.alpha, coverage, spare, size)
        if place is None:
            continue
        x, y, window = place
        for i, visible in enumerate(coverage):
            spare[i] -= float((visible[window] * drawing.alpha).sum())
            visible[window] *= 1 - drawing.alpha
        canvas[window] = canvas[window] * (1 - drawing.alpha) + drawing.colour
        layer = np.zeros((size, size, 1), np.float32)
        layer[window] = drawing.alpha
        area = float(drawing.alpha.sum())
        coverage.append(layer)
        spare.append((1 - MIN_VISIBLE) * area)
        left, top, width, height = drawing.box
        objects.append(SceneObject(int(kind), (x + left, y + top, width, height), area))
    return np.clip(np.rint(canvas), 0, 255).astype(np.uint8), objects


def _place(
    rng: np.random.Generator,
    alpha: Float[ndarray, "h w 1"],
    coverage: Sequence[Float[ndarray, "n n 1"]],
    spare: Sequence[float],
    size: int,
) -> tuple[int, int, tuple[slice, slice]] | None:
    """A position (x, y and the window of the canvas) that leaves every earlier object visible enough, or None."""
    height, width, _ = alpha.shape
    for _ in range(PLACEMENT_ATTEMPTS):
        x, y = int(rng.integers(size - width + 1)), int(rng.integers(size - height + 1))
        window = (slice(y, y + height), slice(x, x + width))
        hidden = (float((visible[window] * alpha).sum()) for visible in coverage)
        if all(pixels <= limit for pixels, limit in zip(hidden, spare, strict=True)):
            return x, y, window
    return None


def _draw(rng: np.random.Generator, kind: Kind, size: int) -> _Drawing:
    """One shape with stripes, a little shading and a darker outline."""
    side = rng.uniform(MIN_SIDE, MAX_SIDE) * size
    angle = rng.uniform(-MAX_ROTATION, MAX_ROTATION)
    stretch = rng.uniform(1, MAX_STRETCH)
    horizontal = rng.random() < 0.5
    scale = np.array([1, 1 / stretch] if horizontal else [1 / stretch, 1])
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    contours = [contour * scale @ turn.T for contour in _contours(kind.shape)]
    low, high = contours[0].min(0), contours[0].max(0)
    enlarge = side / (high - low).max() * OVERSAMPLING
    contours = [(contour - low) * enlarge for contour in contours]

    width, height = (math.ceil(extent / OVERSAMPLING) + 1 for extent in (high - low) * enlarge)
    picture = Image.new("L", (width * OVERSAMPLING, height * OVERSAMPLING))
    outline = picture.copy()
    for contour, value in zip(contours, (255, 0), strict=False):
        points = [(float(x), float(y)) for x, y in contour]
        ImageDraw.Draw(picture).polygon(points, fill=value)
        ImageDraw.Draw(outline).line([*points, points[0]], fill=255, width=2 * OVERSAMPLING)
    inside = np.asarray(picture) > 0
    columns, rows = np.flatnonzero(inside.any(0)), np.flatnonzero(inside.any(1))
    left, top, right, bottom = int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
    box = (left / OVERSAMPLING, top / OVERSAMPLING, (right - left) / OVERSAMPLING, (bottom - top) / OVERSAMPLING)

    paint = _paint(rng, kind, side, inside.shape)
    paint = np.where((np.asarray(outline) > 0)[..., None], paint * 0.55, paint)
    fine = np.concatenate([paint * inside[..., None], inside[..., None]], -1).astype(np.float32)
    steps = range(OVERSAMPLING)
    shrunk = np.mean([fine[i::OVERSAMPLING, j::OVERSAMPLING] for i in steps for j in steps], axis=0)
    return _Drawing(shrunk[..., :3], shrunk[..., 3:], box)


def _contours(shape: str) -> list[Float[ndarray, "points 2"]]:
    """The outer contour about the origin, and after it the hole of a ring."""
    match shape:
        case "square":
            return [_star(4, 1.0, math.pi / 4)]
        case "circle":
            return [_star(64, 1.0)]
        case "triangle":
            return [_star(3, 1.0)]
        case "star":
            return [_star(5, 0.45)]
        case "ring":
            return [_star(64, 1.0), 0.5 * _star(64, 1.0)]
        case "cross":
            a, b = 0.34, 1.0
            corner = np.array([(a, -b), (a, -a), (b, -a)])
            quarter = np.array([[0, -1], [1, 0]])
            return [np.concatenate([corner @ np.linalg.matrix_power(quarter, i).T for i in range(4)])]
        case _:
            raise ValueError(f"no shape is called {shape!r}")


def _star(points: int, inner: float, start: float = 0.0) -> Float[ndarray, "points 2"]:
    """A star with `points` tips, the first one up; inner = 1 gives the regular polygon."""
    if inner == 1.0:
        angles, radii = start + np.arange(points) * math.tau / points, np.ones(points)
    else:
        angles, radii = start + np.arange(2 * points) * math.pi / points, np.tile([1.0, inner], points)
    return np.stack([np.sin(angles) * radii, -np.cos(angles) * radii], -1)


def _paint(rng: np.random.Generator, kind: Kind, side: float, shape: tuple[int, ...]) -> Float[ndarray, "h w 3"]:
    height, width = shape
    y, x = np.mgrid[:height, :width].astype(np.float32) / OVERSAMPLING
    light = rng.uniform(0.92, 1.06) * (1.08 - 0.2 * (x / width + y / height) * OVERSAMPLING / 2)
    paint = np.broadcast_to(np.array(COLOURS[kind.colour], np.float32), (height, width, 3))
    angle, phase = rng.uniform(0, math.pi), rng.uniform(0, 1)
    if kind.pattern == "striped":
        period = max(6.0, 0.2 * side)
        position = (x * math.cos(angle) + y * math.sin(angle)) / period + phase
        dark: Bool[ndarray, "h w"] = position % 1 > 0.58
        paint = np.where(dark[..., None], np.array(STRIPE_COLOUR, np.float32), paint)
    return paint * light[..., None].astype(np.float32)


def _background(rng: np.random.Generator, size: int) -> Float[ndarray, "n n 3"]:
    """A muted colour with a gradient, smooth noise, sometimes faint stripes, and a little grain."""
    base = rng.uniform(70, 165) + rng.uniform(-18, 18, 3)
    y, x = np.mgrid[:size, :size].astype(np.float32) / size - 0.5
    angle = rng.uniform(0, math.tau)
    along = x * math.cos(angle) + y * math.sin(angle)
    picture = base + along[..., None] * rng.uniform(-30, 30, 3)
    for cells, strength in ((4, 14.0), (14, 7.0)):
        noise = rng.normal(0, strength, (cells, cells)).astype(np.float32)
        smooth = Image.fromarray(noise).resize((size, size), Image.Resampling.BICUBIC)
        picture = picture + np.asarray(smooth)[..., None]
    if rng.random() < 0.4:
        picture = picture + rng.uniform(4, 10) * np.sin(along * rng.uniform(20, 70))[..., None]
    return (picture + rng.normal(0, 2.0, (size, size, 1))).astype(np.float32)
