"""Boxes by hand: values, corners ↔ centres, and finite results and gradients at the edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opendet_jax.ops.boxes import giou, iou, logit, nms, to_centres, to_corners

UNIT = jnp.asarray([0.0, 0.0, 1.0, 1.0])


def test_corners_and_centres_are_inverse():
    boxes = jnp.asarray([[0.5, 0.4, 0.2, 0.6], [0.1, 0.1, 0.0, 0.0]])
    np.testing.assert_allclose(to_corners(boxes)[0], [0.4, 0.1, 0.6, 0.7], atol=1e-6)
    np.testing.assert_allclose(to_centres(to_corners(boxes)), boxes, atol=1e-6)


@pytest.mark.parametrize(
    ("other", "overlap", "generalised"),
    [
        ((0.0, 0.0, 1.0, 1.0), 1.0, 1.0),
        ((0.5, 0.0, 1.5, 1.0), 1 / 3, 1 / 3),
        ((0.5, 0.5, 1.5, 1.5), 1 / 7, 1 / 7 - 2 / 9),
        ((2.0, 0.0, 3.0, 1.0), 0.0, -1 / 3),
        ((0.25, 0.25, 0.75, 0.75), 0.25, 0.25),
    ],
)
def test_overlaps_by_hand(other, overlap, generalised):
    np.testing.assert_allclose(iou(UNIT, jnp.asarray(other)), overlap, atol=1e-5)
    np.testing.assert_allclose(giou(UNIT, jnp.asarray(other)), generalised, atol=1e-5)


def test_broadcasting():
    a, b = jnp.tile(UNIT, (3, 1, 1)), jnp.tile(UNIT, (1, 5, 1))
    assert iou(a, b).shape == giou(a, b).shape == (3, 5)


def test_empty_boxes_are_finite():
    empty = jnp.full(4, 0.5)
    for overlap in (iou, giou, lambda a, b: iou(a, b, eps=0.0)):
        value, gradient = jax.value_and_grad(overlap)(empty, empty)
        assert np.isfinite(value)
        assert np.all(np.isfinite(gradient))
    assert iou(empty, empty, eps=0.0) == 0


def test_logit_is_clamped_and_inverts_the_sigmoid():
    x = jnp.asarray([-1.0, 0.0, 1.0, 2.0])
    edge = np.log(1 / 1e-3)
    np.testing.assert_allclose(logit(x), [-edge, -edge, edge, edge], rtol=1e-6)
    inner = jnp.asarray([0.01, 0.3, 0.99])
    np.testing.assert_allclose(jax.nn.sigmoid(logit(inner)), inner, atol=1e-6)
    assert np.all(np.isfinite(jax.vmap(jax.grad(logit))(x)))


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
