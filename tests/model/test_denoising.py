"""Groups, slots and who sees whom; padded objects and empty batches."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opendet_jax.batch import Objects
from opendet_jax.model.denoising import Denoising, attention_mask, denoising_slots, disturb, draw_randoms


def objects_with(valid) -> Objects:
    valid = np.asarray(valid, bool)
    rng = np.random.default_rng(0)
    boxes = np.concatenate([rng.uniform(0.3, 0.7, (*valid.shape, 2)), rng.uniform(0.1, 0.4, (*valid.shape, 2))], -1)
    return Objects(
        boxes=boxes.astype(np.float32),
        valid=valid,
        texts=np.zeros((*valid.shape, 32), np.float32),
        tokens=np.zeros((*valid.shape, 2), np.int32),
    )


@pytest.fixture(scope="module")
def make(tiny, tiny_params):
    def make(objects: Objects):
        slots = denoising_slots(tiny, objects.valid.shape[1])
        randoms = draw_randoms(jax.random.key(3), len(objects.valid), slots, tiny.denoising_labels)
        return jax.jit(Denoising(tiny).apply)({"params": tiny_params["denoising"]}, objects, randoms)

    return make


def test_slots_hold_the_configured_number_or_one_crowded_group(tiny):
    assert denoising_slots(tiny, 4) == 12
    assert denoising_slots(tiny, 9) == 18
    assert denoising_slots(replace(tiny, denoising_queries=200), 100) == 200
    assert denoising_slots(replace(tiny, denoising_queries=0), 100) == 0


def test_none_at_all(tiny):
    """No slots, no parameters, and the queries see each other as ever."""
    config, objects = replace(tiny, denoising_queries=0), objects_with([[1, 1, 0, 0], [1, 0, 0, 0]])
    randoms = draw_randoms(jax.random.key(3), 2, denoising_slots(config, 4), tiny.denoising_labels)
    made, variables = Denoising(config).init_with_output(jax.random.key(0), objects, randoms)
    assert variables == {}
    assert (made.content.shape, made.boxes.shape, made.positive.shape) == ((2, 0, 32), (2, 0, 4), (2, 0))
    query_valid = jnp.array([[True, True, False], [True, True, True]])
    sees = attention_mask(made, query_valid)
    np.testing.assert_array_equal(sees, np.broadcast_to(query_valid[:, None], (2, 3, 3)))


def test_layout(make):
    made = make(objects_with([[1, 1, 0, 0], [1, 0, 0, 0]]))  # 12 // (2·2) = 3 groups of 2 positives, 2 negatives
    assert made.groups == 3
    np.testing.assert_array_equal(made.group[0], np.repeat([0, 1, 2], 4))
    np.testing.assert_array_equal(made.positive[0], [True, True, False, False] * 3)
    np.testing.assert_array_equal(made.positive[1], [True, False, False, False] * 3)
    np.testing.assert_array_equal(made.object[0], [0, 1, 0, 1] * 3)
    assert made.valid.all()
    empty = np.array([False, True, False, True] * 3)
    np.testing.assert_array_equal(made.content[1][empty], 0)
    np.testing.assert_array_equal(made.boxes[1][empty], 0.5)
    assert (np.abs(made.content[1][~empty]).sum(-1) > 0).all()


def test_no_objects_no_queries(make):
    made = make(objects_with(np.zeros((2, 4))))
    assert not made.valid.any()
    assert not made.positive.any()
    assert made.groups >= 1
    np.testing.assert_array_equal(made.content, 0)
    np.testing.assert_array_equal(made.boxes, 0.5)


def test_more_objects_than_slots_make_one_group(make):
    made = make(objects_with(np.ones((1, 9))))
    assert made.groups == 1
    assert made.valid.shape == (1, 18)
    np.testing.assert_array_equal(made.positive[0], np.arange(18) < 9)
    np.testing.assert_array_equal(made.object[0], np.tile(np.arange(9), 2))


def test_unused_slots(make):
    made = make(objects_with(np.ones((1, 5))))  # one group of ten, twelve slots
    np.testing.assert_array_equal(made.valid[0], np.arange(12) < 10)
    assert not made.positive[0, 10:].any()


def test_padding_may_stand_anywhere_and_hold_anything(make):
    objects = objects_with([[0, 1, 0, 1], [1, 1, 0, 0]])
    made = make(objects)
    np.testing.assert_array_equal(made.object[0][:2], [1, 3])
    spoilt = replace(objects, boxes=np.where(objects.valid[..., None], objects.boxes, np.float32(7.0)))
    for a, b in zip(jax.tree.leaves(made), jax.tree.leaves(make(spoilt)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_positives_move_less_than_half_a_side_and_negatives_more():
    boxes = jnp.tile(jnp.array([0.5, 0.5, 0.2, 0.1]), (1, 2, 1))
    negative, ones = jnp.array([[False, True]]), jnp.ones((1, 2, 4))
    u = jnp.full((1, 2, 4), 0.4)
    moved = disturb(boxes, negative, ones, u)  # all corners right and down: the size stays
    np.testing.assert_allclose(moved[0, 0], [0.5 + 0.4 * 0.1, 0.5 + 0.4 * 0.05, 0.2, 0.1], rtol=1e-5)
    np.testing.assert_allclose(moved[0, 1], [0.5 + 1.4 * 0.1, 0.5 + 1.4 * 0.05, 0.2, 0.1], rtol=1e-5)
    crossed = disturb(boxes, negative, jnp.array([1.0, 1.0, -1.0, -1.0]) * ones, u)
    np.testing.assert_allclose(crossed[0, 1, 2:], 1e-3, rtol=2e-3)


def test_small_boxes_keep_their_digits():
    """Beside the same in float64, at any place and clipped at any side."""
    rng = np.random.default_rng(0)
    size = rng.uniform(0.004, 0.02, (1, 4000, 2))
    boxes = np.concatenate([rng.uniform(0.0, 1.0, size.shape), size], -1).astype(np.float32)
    negative = rng.random((1, 4000)) < 0.5
    sign, u = rng.choice([-1.0, 1.0], (1, 4000, 4)).astype(np.float32), rng.random((1, 4000, 4)).astype(np.float32)
    got = np.asarray(disturb(*map(jnp.asarray, (boxes, negative, sign, u))))

    centre, half = np.split(boxes.astype(np.float64), 2, axis=-1)
    half = np.concatenate([half, half], -1) / 2
    corners = np.concatenate([centre, centre], -1) + half * [-1, -1, 1, 1]
    corners = np.clip(corners + sign * (u.astype(np.float64) + negative[..., None]) * half, 0, 1)
    want = np.concatenate([corners[..., :2] + corners[..., 2:], 2 * (corners[..., 2:] - corners[..., :2])], -1) / 2
    inside = (want > 1.001e-3) & (want < 0.999)  # elsewhere the logit is clamped
    assert inside.mean() > 0.5
    np.testing.assert_allclose(got[inside], want[inside], rtol=1e-6)


def test_random_numbers(tiny):
    randoms = draw_randoms(jax.random.key(0), 4, 500, tiny.denoising_labels)
    assert set(np.unique(randoms.new_label)) == set(range(91))
    assert set(np.unique(randoms.sign)) == {-1.0, 1.0}
    for u in (randoms.u_flip, randoms.u_box):
        assert u.min() >= 0
        assert u.max() < 1
        assert abs(u.mean() - 0.5) < 0.03


def test_attention(make):
    made = make(objects_with([[1, 1, 1, 1, 1], [1, 0, 0, 0, 0]]))  # one group of ten, two unused slots
    query_valid = jnp.array([[True, True, False], [True, False, False]])
    sees = np.asarray(attention_mask(made, query_valid))
    for image in range(2):
        groups = np.r_[np.zeros(10), [1, 1], [-1] * 3]
        real = np.r_[np.ones(10, bool), [False, False], query_valid[image]]
        np.testing.assert_array_equal(sees[image], (groups[:, None] == groups) & real)
