"""Greedy suppression against a plain loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opendet_jax.ops.boxes import iou, to_corners
from opendet_jax.ops.nms import nms


def greedy(boxes, scores, valid, threshold):
    """The definition: best first, dropping what the kept ones overlap."""
    overlap = np.asarray(iou(boxes[:, None], boxes[None], eps=0.0))
    kept = []
    for i in np.argsort(-np.asarray(scores), kind="stable"):
        if valid[i] and all(overlap[i, j] <= threshold for j in kept):
            kept.append(i)
    keep = np.zeros(len(boxes), bool)
    keep[kept] = True
    return keep


def crowd(seed, count=60):
    rng = np.random.default_rng(seed)
    centres = rng.uniform(0.3, 0.7, (count, 2))
    boxes = jnp.asarray(np.concatenate([centres, rng.uniform(0.2, 0.4, (count, 2))], -1), jnp.float32)
    scores = jnp.asarray(rng.integers(0, 20, count) / 20, jnp.float32)  # with ties
    return to_corners(boxes), scores, jnp.asarray(rng.uniform(size=count) < 0.8)


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("seed", range(3))
def test_equals_the_greedy_loop(seed, threshold):
    boxes, scores, valid = crowd(seed)
    keep = jax.jit(nms)(boxes, scores, valid, threshold)
    np.testing.assert_array_equal(keep, greedy(boxes, scores, valid, threshold))


def test_what_is_not_valid_influences_nothing():
    boxes, scores, valid = crowd(0)
    keep = nms(boxes, scores, valid, 0.5)
    other = nms(
        jnp.where(valid[:, None], boxes, jnp.asarray([0.0, 0.0, 1.0, 1.0])),
        jnp.where(valid, scores, jnp.nan),
        valid,
        0.5,
    )
    np.testing.assert_array_equal(keep, other)
    assert not np.any(keep & ~valid)


def test_empty_boxes_do_not_suppress_each_other():
    keep = nms(jnp.full((3, 4), 0.5), jnp.ones(3), jnp.ones(3, bool), 0.5)
    assert np.all(keep)
