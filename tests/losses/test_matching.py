"""The matching cost against numpy, and both modes against scipy."""

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import linear_sum_assignment

from opendet_jax.losses.matching import ONE_TO_MANY, ONE_TO_ONE, Predictions, Targets, match, matching_cost


def corners(boxes):
    return np.concatenate([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], -1)


def numpy_cost(boxes, objectness, alignment, object_boxes, weight, alpha):
    """docs/method.md#8-matching in float64, written out."""

    def focal(logit):
        p = 1 / (1 + np.exp(-logit.astype(np.float64)))
        return alpha * (1 - p) ** 2 * -np.log(p + 1e-8) - (1 - alpha) * p**2 * -np.log(1 - p + 1e-8)

    a, b = corners(boxes.astype(np.float64))[:, None], corners(object_boxes.astype(np.float64))[None]
    inner = np.clip(np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]), 0, None).prod(-1)
    hull = (np.maximum(a[..., 2:], b[..., 2:]) - np.minimum(a[..., :2], b[..., :2])).prod(-1)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - inner
    giou = inner / (union + 1e-6) - (hull - union) / (hull + 1e-6)
    l1 = np.abs(boxes[:, None].astype(np.float64) - object_boxes).sum(-1)
    return weight * focal(alignment) + 5 * l1 - 2 * giou + focal(objectness)[:, None]


def example(rng, layers=2, batch=3, queries=14, objects=5):
    def boxes(*shape):
        return np.concatenate([rng.uniform(0.2, 0.8, (*shape, 2)), rng.uniform(0.05, 0.4, (*shape, 2))], -1)

    predictions = Predictions(
        boxes=jnp.asarray(boxes(layers, batch, queries), jnp.float32),
        objectness=jnp.asarray(rng.normal(size=(layers, batch, queries)), jnp.float32),
        alignment=jnp.asarray(3 * rng.normal(size=(layers, batch, queries, objects)), jnp.float32),
        valid=jnp.asarray(rng.random((layers, batch, queries)) < 0.9),
    )
    targets = Targets(
        boxes=jnp.asarray(boxes(batch, objects), jnp.float32),
        valid=jnp.asarray(np.arange(objects) < np.array([[0], [3], [5]])),
        texts=jnp.zeros((batch, objects, 4)),
        tokens=jnp.zeros((batch, objects, 2), int),
    )
    return predictions, targets


def test_cost_is_that_of_the_method():
    predictions, targets = example(np.random.default_rng(0))
    for mode, weight, alpha in ((ONE_TO_ONE, 2.0, 0.25), (ONE_TO_MANY, 0.2, 2.0)):
        one = [np.asarray(x[0, 1]) for x in (predictions.boxes, predictions.objectness, predictions.alignment)]
        one.append(np.asarray(targets.boxes[1]))
        np.testing.assert_allclose(
            matching_cost(*map(jnp.asarray, one), mode), numpy_cost(*one, weight, alpha), rtol=1e-5, atol=1e-5
        )


def test_cost_is_finite_for_saturated_logits_and_empty_boxes():
    boxes = jnp.array([[0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0], [0.5, 0.5, 1.0, 1.0]])
    for z in (-200.0, 200.0):
        cost = matching_cost(boxes, jnp.full(3, z), jnp.full((3, 3), z), boxes, ONE_TO_MANY)
        assert np.isfinite(np.asarray(cost)).all()


def test_each_copy_of_each_object_gets_its_best_valid_query():
    predictions, targets = example(np.random.default_rng(1))
    for mode in (ONE_TO_ONE, ONE_TO_MANY):
        matches = jax.jit(match, static_argnums=2)(predictions, targets, mode)
        for layer in range(2):
            for image in range(3):
                valid = np.asarray(predictions.valid[layer, image])
                real = np.flatnonzero(targets.valid[image])
                cost = numpy_cost(
                    np.asarray(predictions.boxes[layer, image])[valid],
                    np.asarray(predictions.objectness[layer, image])[valid],
                    np.asarray(predictions.alignment[layer, image])[valid][:, real],
                    np.asarray(targets.boxes[image])[real],
                    mode.alignment_weight,
                    mode.alpha,
                )
                rows, columns = linear_sum_assignment(np.tile(cost, (1, mode.copies)))
                want = np.full(len(valid), -1)
                if len(real):
                    want[np.flatnonzero(valid)[rows]] = real[columns % len(real)]
                np.testing.assert_array_equal(matches.object[layer, image], want)
                query = np.asarray(matches.query[layer, image])
                assert (query[:, ~np.asarray(targets.valid[image])] == -1).all()
                for copy, j in np.argwhere(query >= 0):
                    assert want[query[copy, j]] == j
                assert (query >= 0).sum() == (want >= 0).sum() == mode.copies * len(real)


def test_no_gradient_flows():
    predictions, targets = example(np.random.default_rng(2))

    def total(boxes):
        return match(predictions.replace(boxes=boxes), targets, ONE_TO_ONE).query.astype(jnp.float32).sum()

    assert (jax.grad(total)(predictions.boxes) == 0).all()
