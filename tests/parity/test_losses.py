"""Matching costs, assignments, and every loss with its gradients on small inputs of the authors' program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opendet_jax.config import LossConfig
from opendet_jax.losses.detection import giou_loss, l1_loss, objectness_focal_loss
from opendet_jax.losses.joint import joint_loss
from opendet_jax.losses.masked_alignment import masked_alignment_loss, overlapping, same_name
from opendet_jax.losses.matching import ONE_TO_MANY, ONE_TO_ONE, Predictions, Targets, match, matching_cost
from opendet_jax.ops.boxes import iou, to_corners
from tests.parity import report
from tests.parity.vectors import Vectors

MODES = {"one_to_one": ONE_TO_ONE, "one_to_many": ONE_TO_MANY}
COST_TOLERANCE = 1e-5
LOSS_TOLERANCE = 1e-6
GRADIENT_TOLERANCE = 2e-6


def inputs(units: Vectors, case: str) -> tuple[Predictions, Targets]:
    """The predictions (as a stack of one layer) and the objects of one case."""
    boxes = jnp.asarray(units[f"losses/{case}/boxes"])
    object_boxes = jnp.asarray(units[f"losses/{case}/object_boxes"])
    valid = np.arange(object_boxes.shape[1]) < units[f"losses/{case}/count"][:, None]
    predictions = Predictions(
        boxes=boxes[None],
        objectness=jnp.asarray(units[f"losses/{case}/objectness"])[None],
        alignment=jnp.asarray(units[f"losses/{case}/align"])[None],
        valid=jnp.ones((1, *boxes.shape[:2]), bool),
    )
    targets = Targets(
        boxes=object_boxes,
        valid=jnp.asarray(valid),
        texts=jnp.asarray(units[f"losses/{case}/texts"]),
        tokens=jnp.zeros((*valid.shape, 1), int),
    )
    return predictions, targets


def stored_matches(units: Vectors, prefix: str, batch: int, queries: int) -> np.ndarray:
    """The object of each query, −1 for none."""
    matched = np.full((batch, queries), -1)
    for image in range(batch):
        matched[image, units[f"{prefix}/query_{image}"]] = units[f"{prefix}/object_{image}"]
    return matched


def variants(units: Vectors, wanted: tuple[str, ...]) -> list[tuple[str, str, str]]:
    """(case, variant, mode) of all that the file holds of the variants wanted."""
    found = [
        (case, variant, mode)
        for case in units.cases("losses/")
        for variant in wanted
        for mode in MODES
        if f"losses/{case}/{variant}/{mode}/query_0" in units
    ]
    assert found
    return found


def comparable(units: Vectors) -> list[tuple[str, str, str]]:
    """The program's own is the same only one-to-one, and for a single image (docs/method.md#12-paper-and-program)."""
    return [
        (case, variant, mode)
        for case, variant, mode in variants(units, ("clean", "program"))
        if variant == "clean" or (mode == "one_to_one" and len(units[f"losses/{case}/count"]) == 1)
    ]


@pytest.mark.needs("losses/")
def test_cost(unit_vectors):
    units = unit_vectors
    for case, variant, mode in variants(units, ("clean",)):
        predictions, targets = inputs(units, case)
        for image, count in enumerate(units[f"losses/{case}/count"]):
            cost = matching_cost(
                predictions.boxes[0, image],
                predictions.objectness[0, image],
                predictions.alignment[0, image],
                targets.boxes[image],
                MODES[mode],
            )
            own = jnp.tile(cost[:, :count], (1, MODES[mode].copies))
            units.assert_close("matching costs", f"losses/{case}/{variant}/{mode}/cost_{image}", own, COST_TOLERANCE)


@pytest.mark.needs("losses/")
def test_assignment(unit_vectors):
    units = unit_vectors
    for case, variant, mode in comparable(units):
        predictions, targets = inputs(units, case)
        matches = match(predictions, targets, MODES[mode])
        batch, queries = predictions.objectness.shape[1:]
        want = stored_matches(units, f"losses/{case}/{variant}/{mode}", batch, queries)
        report.enter("matchings", units.name, want, matches.object[0], 0.0)
        np.testing.assert_array_equal(matches.object[0], want)

        # The other side of the same pairs, every copy once.
        for image, count in enumerate(units[f"losses/{case}/count"]):
            copies = np.asarray(matches.query[0, image])
            assert (copies[:, count:] == -1).all()
            pairs = {(int(q), j) for copy in copies for j, q in enumerate(copy[:count])}
            assert pairs == {(q, int(want[image, q])) for q in np.flatnonzero(want[image] >= 0)}


@pytest.mark.needs("losses/")
def test_same_name(unit_vectors):
    for case in unit_vectors.cases("losses/"):
        _, targets = inputs(unit_vectors, case)
        got = same_name(targets.texts, targets.valid, LossConfig().name_mask_threshold)
        real = targets.valid[:, :, None] & targets.valid[:, None]
        np.testing.assert_array_equal(got, np.asarray(real) & (unit_vectors[f"losses/{case}/same_text"] > 0))


@pytest.mark.needs("losses/")
def test_losses_and_gradients(unit_vectors):
    for case, variant, mode in comparable(unit_vectors):
        assert_losses_and_gradients(unit_vectors, case, variant, mode)


def assert_losses_and_gradients(units: Vectors, case: str, variant: str, mode: str) -> None:
    stack, targets = inputs(units, case)
    predictions = jax.tree.map(lambda x: x[0], stack)
    prefix = f"losses/{case}/{variant}/{mode}"
    batch, queries = predictions.objectness.shape
    matched_object = jnp.asarray(stored_matches(units, prefix, batch, queries))
    matched = matched_object >= 0
    index = jnp.maximum(matched_object, 0)[..., None]
    own = jnp.take_along_axis(targets.boxes, index, axis=1)
    normaliser = jnp.float32(MODES[mode].copies * int(targets.valid.sum()))

    counted = jnp.broadcast_to(targets.valid[:, None], predictions.alignment.shape)
    if mode == "one_to_one":
        counted &= overlapping(predictions.boxes, targets.boxes)
    mask = same_name(targets.texts, targets.valid, LossConfig().name_mask_threshold)
    scores = jnp.take_along_axis(predictions.alignment, index, axis=2)[..., 0]
    overlap = iou(to_corners(predictions.boxes), to_corners(own))

    def focal(z):
        return objectness_focal_loss(z, matched, predictions.valid, normaliser)

    def joint(z):
        return joint_loss(z, scores, overlap, matched, predictions.valid, normaliser)

    units.assert_close("unit losses", f"{prefix}/loss_bce_focal_part", focal(predictions.objectness), LOSS_TOLERANCE)
    units.assert_close("unit losses", f"{prefix}/loss_bce_joint_part", joint(predictions.objectness), LOSS_TOLERANCE)
    for name, loss, argument in (
        ("ce", lambda s: masked_alignment_loss(s, matched_object, mask, counted), "align"),
        ("bce", lambda z: focal(z) + joint(z), "objectness"),
        ("bbox", lambda b: l1_loss(b, own, matched, normaliser), "boxes"),
        ("giou", lambda b: giou_loss(b, own, matched, normaliser), "boxes"),
    ):
        value = {"align": predictions.alignment, "objectness": predictions.objectness, "boxes": predictions.boxes}
        got, gradient = jax.value_and_grad(loss)(value[argument])
        units.assert_close("unit losses", f"{prefix}/loss_{name}", got, LOSS_TOLERANCE)
        units.assert_close("unit loss gradients", f"{prefix}/loss_{name}_grad_{argument}", gradient, GRADIENT_TOLERANCE)
