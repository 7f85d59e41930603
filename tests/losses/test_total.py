"""The total on a small example: terms, weights, masks, ablations (docs/method.md#11-total-loss-and-optimizer)."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opendet_jax.config import Ablation
from opendet_jax.losses.total import WEIGHTS
from tests.losses import examples
from tests.losses.examples import A, G, N, Q, terms_and_gradients, terms_only

SETS = [f"layer_{n}" for n in range(1, A + 1)]
DENOISING = [f"denoising_{n}" for n in range(1, A + 1)]


@pytest.fixture(scope="module")
def example():
    rng = np.random.default_rng(0)
    objects = examples.objects(rng)
    training = examples.training(rng, objects.valid)
    return training, examples.weights(rng), objects, examples.noise(rng)


@pytest.fixture(scope="module")
def full(example):
    return terms_and_gradients(*example)


def total_of(terms):
    return sum(WEIGHTS[name.split("/")[0]] * float(term) for name, term in terms.items() if name != "total")


def assert_finite(terms, gradients):
    for name, term in terms.items():
        assert np.isfinite(term), name
    for gradient in jax.tree.leaves(gradients):
        assert np.isfinite(gradient).all()


def test_terms_and_their_weights(full):
    terms, gradients = full
    expected = {f"{term}/{s}" for term in ("l1", "giou", "joint", "focal") for s in [*SETS, "encoder", *DENOISING]}
    expected |= {f"alignment/{s}" for s in [*SETS, "encoder"]}
    expected |= {f"distillation/{s}_{n}" for s in ("layer", "denoising") for n in (A - 1, A)}
    assert set(terms) == expected | {"naming", "text_denoising", "total"}
    assert float(terms["total"]) == pytest.approx(total_of(terms), rel=1e-6)
    assert_finite(terms, gradients)
    assert all(float(term) > 0 for term in terms.values())


def test_denoising_slots(example, full):
    """Negatives and empty slots of used groups count as unmatched, unused slots nowhere; over objects × groups."""
    training, _, objects, _ = example
    dn = training.denoising
    assert int(dn.groups) == 3  # of three objects: 18 of the 20 slots
    assert int(dn.valid.sum()) == 3 * 18
    z = np.asarray(training.decoded.objectness[1, :, :N], np.float64)
    p = 1 / (1 + np.exp(-z))
    focal = np.where(dn.positive, -0.25 * (1 - p) ** 2 * np.log(p), -0.75 * p**2 * np.log(1 - p))
    want = focal[np.asarray(dn.valid)].sum() / (int(objects.valid.sum()) * 3)
    assert full[0]["focal/denoising_2"] == pytest.approx(want, rel=1e-5)
    own = np.take_along_axis(np.asarray(objects.boxes), np.asarray(dn.object)[..., None], 1)
    l1 = np.abs(np.asarray(training.decoded.boxes[1, :, :N]) - own).sum(-1)[np.asarray(dn.positive)].sum()
    assert full[0]["l1/denoising_2"] == pytest.approx(l1 / (5 * 3), rel=1e-5)


def test_padding_influences_nothing(example, full):
    """Bitwise, in values and gradients: padded objects, invalid queries, unused denoising slots."""
    training, weights, objects, noise = example
    real = objects.valid[..., None]
    poisoned_objects = replace(
        objects,
        boxes=jnp.where(real, objects.boxes, jnp.nan),
        texts=jnp.where(real, objects.texts, jnp.nan),
        tokens=jnp.where(real, objects.tokens, 7),
    )
    valid = jnp.concatenate([training.denoising.valid, training.queries.valid], axis=1)
    queries, decoded = training.queries, training.decoded
    poisoned = training.replace(
        queries=queries.replace(
            boxes=jnp.where(queries.valid[..., None], queries.boxes, jnp.nan),
            objectness=jnp.where(queries.valid, queries.objectness, jnp.inf),
        ),
        decoded=decoded.replace(
            hidden=jnp.where(valid[..., None], decoded.hidden, jnp.nan),
            boxes=jnp.where(valid[..., None], decoded.boxes, jnp.nan),
            objectness=jnp.where(valid, decoded.objectness, jnp.inf),
        ),
        alignment=jnp.where(valid[..., None] & objects.valid[:, None], training.alignment, jnp.nan),
        encoder_alignment=jnp.where(
            queries.valid[..., None] & objects.valid[:, None], training.encoder_alignment, jnp.nan
        ),
    )
    poisoned_noise = jax.tree.map(lambda x: jnp.where(real, x, jnp.nan), noise)
    got = terms_and_gradients(poisoned, weights, poisoned_objects, poisoned_noise)
    jax.tree.map(np.testing.assert_array_equal, got, full)

    for name in ("boxes", "objectness", "alignment", "distilled", "language"):
        assert (got[1][name][:, ~valid] == 0).all(), name
    for name in ("encoder_boxes", "encoder_objectness", "encoder_alignment"):
        assert (got[1][name][~queries.valid] == 0).all(), name


def test_gradients_reach_what_they_should(full):
    """Matching queries by all terms, denoising ones not by alignment (the Joint Loss's target has no gradient)."""
    gradients = full[1]
    assert (gradients["alignment"][:, :, :N] == 0).all()
    assert (gradients["language"][:, :, :N] == 0).all()
    assert (gradients["boxes"][:, :, :N] != 0).any()
    assert (gradients["distilled"][:, :, :N] != 0).any()
    for name, gradient in gradients.items():
        queries = gradient[:, :, N:] if gradient.shape[:1] == (A,) else gradient
        assert (queries != 0).any(), name


def test_without_denoising_slots_only_their_terms_are_gone(example, full):
    training, *others = example
    denoising = training.denoising
    fields = {name: value[:, :0] for name, value in vars(denoising).items() if name != "groups"}
    decoded = jax.tree.map(lambda x: x[:, :, N:], training.decoded)
    without = training.replace(
        denoising=denoising.replace(**fields), decoded=decoded, alignment=training.alignment[:, :, N:]
    )
    terms = terms_only(without, *others, Ablation())
    assert set(terms) == {name for name in full[0] if "/denoising_" not in name}
    for name in set(terms) - {"total"}:
        assert float(terms[name]) == pytest.approx(float(full[0][name]), rel=1e-6), name
    assert float(terms["total"]) == pytest.approx(total_of(terms), rel=1e-6)


OFF = {
    "masked_alignment": (set(), {f"alignment/{s}" for s in [*SETS, "encoder"]}),
    "joint_loss": ({f"joint/{s}" for s in [*SETS, "encoder", *DENOISING]}, set()),
    "text_denoising": ({"text_denoising"}, set()),
    "distiller": ({f"distillation/{s}_{n}" for s in ("layer", "denoising") for n in (A - 1, A)}, set()),
    "object_detector": (
        set(),
        {f"{term}/layer_{n}" for term in ("l1", "giou", "joint", "focal", "alignment") for n in (1, 2)},
    ),
}


@pytest.mark.parametrize("switch", OFF)
def test_an_ablation_changes_its_own_terms_only(example, full, switch):
    removed, changed = OFF[switch]
    terms = terms_only(*example, Ablation(**{switch: False}))
    assert set(full[0]) - set(terms) == removed
    assert set(terms) <= set(full[0])
    for name in set(terms) - {"total"}:
        same = float(terms[name]) == pytest.approx(float(full[0][name]), rel=1e-6)
        assert same == (name not in changed), name
    assert float(terms["total"]) == pytest.approx(total_of(terms), rel=1e-6)


@pytest.mark.parametrize(
    ("counts", "query_counts"),
    [((0, 0, 0), (Q, Q, Q)), ((4, 4, 4), (3, 1, Q)), ((1, 0, 0), (1, 1, 1))],
    ids=["no object at all", "more objects than queries", "one object, one query"],
)
def test_unusual_batches_are_finite(counts, query_counts):
    rng = np.random.default_rng(1)
    objects = examples.objects(rng, counts)
    training = examples.training(rng, objects.valid, query_counts)
    weights, noise = examples.weights(rng), examples.noise(rng)
    terms, gradients = terms_and_gradients(training, weights, objects, noise)
    assert_finite(terms, gradients)
    if sum(counts) == 0:
        for name, term in terms.items():
            empty = name.split("/")[0] not in ("joint", "focal", "total") or name.startswith(("joint/d", "focal/d"))
            assert (float(term) == 0) == empty, name


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_saturated_predictions_are_finite(example, sign):
    """Logits of ±500, every box a point on the border, and one box and one name for all objects."""
    training, weights, objects, noise = example
    corner = jnp.array([1.0, 1.0, 0.0, 0.0])
    training = training.replace(
        queries=training.queries.replace(
            boxes=jnp.broadcast_to(corner, training.queries.boxes.shape),
            objectness=jnp.full_like(training.queries.objectness, 500 * sign),
        ),
        decoded=training.decoded.replace(
            boxes=jnp.broadcast_to(corner, training.decoded.boxes.shape),
            objectness=jnp.full_like(training.decoded.objectness, 500 * sign),
        ),
        alignment=jnp.full_like(training.alignment, -500 * sign),
        encoder_alignment=jnp.full_like(training.encoder_alignment, -500 * sign),
    )
    objects = replace(
        objects,
        boxes=jnp.broadcast_to(corner, objects.boxes.shape),
        texts=jnp.broadcast_to(objects.texts[:1, :1], objects.texts.shape),
    )
    assert_finite(*terms_and_gradients(training, weights, objects, noise))


def test_an_image_without_objects_changes_no_mean_over_images(example, full):
    """The middle image has none: with its numbers exchanged, distillation and naming stay as they are."""
    training, weights, objects, noise = example
    assert not objects.valid[1].any()
    decoded = training.decoded.replace(hidden=training.decoded.hidden.at[:, 1].add(1.0))
    terms, _ = terms_and_gradients(training.replace(decoded=decoded), weights, objects, noise)
    assert {k: float(v) for k, v in terms.items()} == {k: float(v) for k, v in full[0].items()}


def test_the_order_of_objects_does_not_matter(example, full):
    """Real objects may stand in any of the G slots."""
    training, weights, objects, noise = example
    order = jnp.array([3, 1, 0, 2])
    place = jnp.argsort(order)
    moved = jax.tree.map(lambda x: x[:, order], objects)
    dn = training.denoising
    training = training.replace(
        alignment=training.alignment[..., order],
        encoder_alignment=training.encoder_alignment[..., order],
        denoising=dn.replace(object=place[dn.object]),
    )
    assert len(order) == G
    terms, _ = terms_and_gradients(training, weights, moved, jax.tree.map(lambda x: x[:, order], noise))
    for name, term in terms.items():
        assert float(term) == pytest.approx(float(full[0][name]), rel=1e-5), name
