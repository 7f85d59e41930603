"""What all forms of the operation share: how levels lie in the sequence of tokens."""

from itertools import accumulate

LevelShapes = tuple[tuple[int, int], ...]  # (h, w) of each level, static


def level_starts(level_shapes: LevelShapes) -> tuple[int, ...]:
    """First token of each level: levels follow each other, each row by row."""
    return tuple(accumulate((h * w for h, w in level_shapes[:-1]), initial=0))
