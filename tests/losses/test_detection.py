"""Box, focal, joint, alignment and distillation losses: cases worked by hand, masks, and the edges of their domains."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opendet_jax.losses.detection import focal_cross_entropy, giou_loss, l1_loss, objectness_focal_loss
from opendet_jax.losses.distillation import distillation_loss
from opendet_jax.losses.joint import joint_loss, joint_target
from opendet_jax.losses.masked_alignment import masked_alignment_loss, overlapping, own_name, same_name

ONE = jnp.float32(1.0)


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def test_boxes_by_hand():
    boxes = jnp.array([[[0.25, 0.25, 0.5, 0.5], [0.5, 0.5, 0.2, 0.2]]])
    targets = jnp.array([[[0.75, 0.75, 0.5, 0.5], [0.5, 0.5, 0.2, 0.2]]])
    both, first = jnp.array([[True, True]]), jnp.array([[True, False]])
    two = jnp.float32(2.0)
    assert l1_loss(boxes, targets, both, two) == pytest.approx(0.5)
    # Two quarters of the square touch in a corner: IoU 0, hull 1, union ½, GIoU −½.
    assert giou_loss(boxes, targets, first, ONE) == pytest.approx(1.5, abs=1e-5)
    assert giou_loss(boxes, targets, both, two) == pytest.approx(0.75, abs=1e-4)


def test_focal_by_hand():
    logits = jnp.array([0.0, 2.0, -1.0])
    p = sigmoid(logits)
    np.testing.assert_allclose(
        focal_cross_entropy(logits, jnp.ones(3, bool)), -0.25 * (1 - p) ** 2 * np.log(p), rtol=1e-5
    )
    np.testing.assert_allclose(focal_cross_entropy(logits, jnp.zeros(3, bool)), -0.75 * p**2 * np.log(1 - p), rtol=1e-5)


def test_joint_by_hand():
    z, s, u = jnp.array([[0.3, -2.0, 1.0]]), jnp.array([[1.5, 0.2, 9.0]]), jnp.array([[0.6, 0.0, 1.0]])
    matched, valid = jnp.array([[True, True, False]]), jnp.array([[True, True, True]])
    p, a = sigmoid(z), 0.25
    t = np.maximum(0.1, np.sqrt(p**a * np.maximum(np.asarray(u, np.float64), 0.01) ** (1 - 2 * a) * sigmoid(s) ** a))
    np.testing.assert_allclose(joint_target(z, s, u), t, rtol=1e-5)
    want = -((t - p) ** 2 * np.log(p) + (1 - t) * p**2 * np.log(1 - p))[0, :2].sum()
    want -= (p**2 * np.log(1 - p))[0, 2]
    assert joint_loss(z, s, u, matched, valid, jnp.float32(2.0)) == pytest.approx(want / 2, rel=1e-5)


def test_joint_target_is_at_least_a_tenth_and_has_no_gradient():
    low = joint_target(jnp.array([-60.0]), jnp.array([-60.0]), jnp.array([0.0]))
    assert low[0] == pytest.approx(0.1)
    gradients = jax.grad(lambda *x: joint_target(*x).sum(), argnums=(0, 1, 2))(
        jnp.array([0.5]), jnp.array([0.5]), jnp.array([0.5])
    )
    assert all((g == 0).all() for g in gradients)


@pytest.mark.parametrize("z", [-1e4, -100.0, 0.0, 100.0, 1e4])
def test_saturated_logits_are_finite(z):
    logit, yes, no = jnp.full((1, 2), z), jnp.ones((1, 2), bool), jnp.zeros((1, 2), bool)
    for matched in (yes, no):
        for loss in (
            lambda x, m=matched: objectness_focal_loss(x, m, yes, ONE),
            lambda x, m=matched: joint_loss(x, x, jnp.full((1, 2), 0.5), m, yes, ONE),
        ):
            value, gradient = jax.value_and_grad(loss)(logit)
            assert np.isfinite(value)
            assert np.isfinite(gradient).all()


@pytest.mark.parametrize(
    "box", [[0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0], [0.5, 0.5, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]]
)
def test_boxes_on_the_border_are_finite(box):
    boxes, matched = jnp.array([[box]]), jnp.ones((1, 1), bool)
    for target in (boxes, jnp.array([[[0.3, 0.4, 0.1, 0.2]]])):
        for loss in (l1_loss, giou_loss):
            value, gradient = jax.value_and_grad(loss)(boxes, target, matched, ONE)
            assert np.isfinite(value)
            assert np.isfinite(gradient).all()


def test_names_are_the_same_above_the_threshold_only():
    angle = np.arccos(np.array([1.0, 0.995, 0.985]))
    texts = jnp.asarray(np.stack([np.cos(angle), np.sin(angle)], -1), jnp.float32)[None]
    valid = jnp.array([[True, True, True]])
    got = np.asarray(same_name(texts, valid, 0.99))[0]
    np.testing.assert_array_equal(got[0], [True, True, False])
    np.testing.assert_array_equal(same_name(texts, jnp.array([[True, False, True]]), 0.99)[0, 0], [True, False, False])
    np.testing.assert_array_equal(own_name(valid)[0], np.eye(3, dtype=bool))


def test_alignment_by_hand():
    scores = jnp.array([[[0.5, -1.0, 2.0], [0.0, 0.3, -0.7]]])
    # Objects 0 and 2 share a name; query 0 has object 2, query 1 none; the pair (1, 1) is left out.
    mask = jnp.array([[[True, False, True], [False, True, False], [True, False, True]]])
    counted = jnp.array([[[True, True, True], [True, False, True]]])
    labels = np.array([[1, 0, 1], [0, 0, 0]])
    p = sigmoid(scores)[0]
    losses = np.where(labels == 1, -0.25 * (1 - p) ** 2 * np.log(p), -0.75 * p**2 * np.log(1 - p))
    want = losses[np.asarray(counted[0])].sum() / 2
    got = masked_alignment_loss(scores, jnp.array([[2, -1]]), mask, counted)
    assert got == pytest.approx(want, rel=1e-5)


def test_alignment_without_positives_is_finite():
    loss = masked_alignment_loss(
        jnp.zeros((1, 2, 1)), jnp.full((1, 2), -1), jnp.ones((1, 1, 1), bool), jnp.ones((1, 2, 1), bool)
    )
    assert loss == pytest.approx(2 * 0.75 * 0.25 * np.log(2), rel=1e-5)


def test_pairs_that_hardly_overlap_do_not_count():
    boxes = jnp.array([[[0.5, 0.5, 0.2, 0.2], [0.1, 0.1, 0.1, 0.1], [0.5, 0.5, 0.0, 0.0]]])
    np.testing.assert_array_equal(
        overlapping(boxes, boxes)[0], [[True, False, False], [False, True, False], [False, False, False]]
    )


def test_distillation_by_hand():
    prompts = jnp.array(
        [[[2.0, 0.0], [0.0, 3.0], [5.0, 5.0]], [[0.0, 1.0], [jnp.nan, 0.0], [0.0, 0.0]], [[1.0, 0.0]] * 3]
    )
    texts = jnp.array([[[1.0, 0.0], [0.0, 1.0]]] * 3)
    # Image 0: cosines 1 and 0; image 1: cosine 1; image 2 has no pair and is no part of the mean.
    matched = jnp.array([[0, 0, -1], [1, -1, -1], [-1, -1, -1]])
    value, gradient = jax.value_and_grad(distillation_loss)(prompts, texts, matched)
    assert value == pytest.approx((0.5 + 0.0) / 2)
    assert np.isfinite(gradient).all()
    assert (gradient[matched < 0] == 0).all()
    assert distillation_loss(prompts, texts, jnp.full((3, 3), -1)) == 0


def test_distillation_of_a_zero_prompt_is_finite():
    value, gradient = jax.value_and_grad(distillation_loss)(
        jnp.zeros((1, 1, 2)), jnp.array([[[1.0, 0.0]]]), jnp.zeros((1, 1), int)
    )
    assert value == 1
    assert np.isfinite(gradient).all()
