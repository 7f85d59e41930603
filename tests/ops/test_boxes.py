"""Boxes by hand: values, corners ↔ centres, and finite results and gradients at the edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opendet_jax.ops.boxes import giou, iou, logit, to_centres, to_corners

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
