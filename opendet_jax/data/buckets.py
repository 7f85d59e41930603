"""Buckets: the few padded sizes (H, W) that batches may have, since XLA compiles once per shape."""

from collections.abc import Sequence

Size = tuple[int, int]  # height, width


def fit(size: Size, bucket: Size) -> Size:
    """`size`, made smaller at its aspect ratio where it does not fit into the bucket."""
    shrink = min(1.0, bucket[0] / size[0], bucket[1] / size[1])
    height, width = (min(b, max(1, round(s * shrink))) for s, b in zip(size, bucket, strict=True))
    return height, width


def choose(size: Size, buckets: Sequence[Size]) -> int:
    """Index of the bucket in which an image of this size needs the least shrinking and then the least padding."""

    def cost(i: int) -> tuple[float, int, int]:
        height, width = buckets[i]
        return -min(1.0, height / size[0], width / size[1]), height * width, i

    return min(range(len(buckets)), key=cost)
