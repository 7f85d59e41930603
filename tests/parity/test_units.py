"""Single operations against the authors' numbers (units*.npz)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opendet_jax.model.encoder import Memory
from opendet_jax.model.layers import DeformableAttention, Pyramid
from opendet_jax.model.neck import sine_embedding
from opendet_jax.model.query_selection import fill_as_program, proposals, select_best
from opendet_jax.model.swin import relative_position_index
from opendet_jax.model.t5_layers import relative_buckets
from opendet_jax.ops import boxes as box_ops
from opendet_jax.ops.boxes import nms
from opendet_jax.ops.deformable_attention import deformable_attention
from opendet_jax.weights.rules import Rules
from opendet_jax.weights.rules import deformable_attention as deformable_rules
from tests.parity import report
from tests.parity.vectors import STAGE, weight_rule

GRADIENT = 5e-5  # gradients reach 62; the authors' own float32 is 3e-5 off
MINIMUM, CAP, THRESHOLD = 300, 900, 0.05


def level_shapes(units, key):
    return tuple((int(h), int(w)) for h, w in units[key])


@pytest.mark.needs("deform/value", "deform/locations", "deform/weights", "deform/level_shapes", "deform/cotangent")
def test_deformable_attention(unit_vectors):
    units = unit_vectors
    shapes = level_shapes(units, "deform/level_shapes")
    arguments = (units["deform/value"], units["deform/locations"], units["deform/weights"])
    out, pull = jax.vjp(lambda v, x, a: deformable_attention(v, shapes, x, a), *map(jnp.asarray, arguments))
    units.assert_close("deformable attention, op", "deform/out", out, STAGE)
    for name, gradient in zip(("value", "locations", "weights"), pull(units["deform/cotangent"]), strict=True):
        units.assert_close("deformable attention, op gradients", f"deform/grad_{name}", gradient, GRADIENT)


@pytest.mark.needs("deform_module/query", "deform_module/source", "deform_module/mask", "deform_module/cotangent")
def test_deformable_attention_module(unit_vectors):
    """Every stored case: 4 and 16 points, reference points and boxes."""
    units = unit_vectors
    cases = [case for case in units.cases("deform_module/") if f"deform_module/{case}/reference" in units]
    assert cases
    for case in cases:
        points = int(case.removeprefix("points").split("_")[0])
        key, valid = f"deform_module/{case}", ~units["deform_module/mask"]
        out, pull, _ = _module(units, points, units[f"{key}/reference"])
        to_query, to_reference, to_source = pull(jnp.asarray(units["deform_module/cotangent"]))
        gradients = "deformable attention, module gradients"
        units.assert_close("deformable attention, module", f"{key}/out", out, STAGE)
        units.assert_close(gradients, f"{key}/grad_query", to_query, GRADIENT)
        units.assert_close(gradients, f"{key}/grad_reference", to_reference, GRADIENT)
        norms = np.linalg.norm(np.asarray(to_source, np.float64), axis=-1)
        units.assert_close(gradients, f"{key}/grad_source_l2_per_token", norms, GRADIENT)
        assert not np.any(np.asarray(to_source)[~valid])


def _module(units, points: int, reference: np.ndarray):
    """Output and pullback of the module with the weights that belong to a number of points."""
    make, salt = weight_rule(units.path.parent).make, str(units["meta/salt"])
    width, heads, levels = units["deform_module/query"].shape[-1], 8, reference.shape[2]
    shapes = {
        "value_proj": (width, width),
        "sampling_offsets": (heads * levels * points * 2, width),
        "attention_weights": (heads * levels * points, width),
        "output_proj": (width, width),
    }
    names = {f"{part}.weight": shape for part, shape in shapes.items()}
    names |= {f"{part}.bias": shape[:1] for part, shape in shapes.items()}
    state = {f"a.{name}": make(f"unit.deform{points}.{name}", shape, salt) for name, shape in names.items()}
    wanted = {f"a/{part}/kernel": shape[::-1] for part, shape in shapes.items()}
    wanted |= {f"a/{part}/bias": shape[:1] for part, shape in shapes.items()}
    params = Rules(deformable_rules("a", "a")).to_ours(state, wanted)["a"]
    valid = jnp.asarray(~units["deform_module/mask"])
    ratios = jnp.ones((len(valid), levels, 2))

    def run(query, reference, source):
        pyramid = Pyramid(source, valid, ratios, level_shapes(units, "deform_module/level_shapes"))
        return DeformableAttention(width, heads, levels, points).apply({"params": params}, query, reference, pyramid)

    arguments = (units["deform_module/query"], reference, units["deform_module/source"])
    return *jax.vjp(run, *map(jnp.asarray, arguments)), params


@pytest.mark.needs("sine/mask")
def test_sine_embedding(unit_vectors):
    out = sine_embedding(jnp.asarray(~unit_vectors["sine/mask"]), 256)
    unit_vectors.assert_close("sine positions", "sine/out", np.asarray(out).transpose(0, 3, 1, 2), STAGE)


@pytest.mark.needs("boxes/a", "boxes/b", "boxes/logit_in")
def test_boxes(unit_vectors):
    units, stage = unit_vectors, "box operations"
    a, b = (box_ops.to_corners(jnp.asarray(units[f"boxes/{name}"])) for name in "ab")
    a, b = a[:, None], b[None]
    units.assert_close(stage, "boxes/iou", box_ops.iou(a, b), STAGE)
    units.assert_close(stage, "boxes/giou", box_ops.giou(a, b), STAGE)
    units.assert_close(stage, "boxes/iou_without_eps", box_ops.iou(a, b, eps=0.0), STAGE)
    units.assert_close(stage, "boxes/logit_out", box_ops.logit(jnp.asarray(units["boxes/logit_in"])), STAGE)


@pytest.mark.needs("nms/boxes", "nms/scores", "nms/keep")
def test_nms(unit_vectors):
    units = unit_vectors
    scores = jnp.asarray(units["nms/scores"])
    keep = nms(box_ops.to_corners(jnp.asarray(units["nms/boxes"])), scores, jnp.ones(len(scores), bool), 0.9)
    want = np.isin(np.arange(len(scores)), units["nms/keep"])
    report.enter("NMS kept", units.name, want, keep, 0.0)
    np.testing.assert_array_equal(keep, want)


@pytest.mark.needs("swin/relative_position_index_7")
def test_relative_position_index(unit_vectors):
    unit_vectors.assert_equal("Swin relative positions", "swin/relative_position_index_7", relative_position_index(7))


@pytest.mark.needs("t5_buckets/relative_position")
def test_relative_buckets(unit_vectors):
    distance = unit_vectors["t5_buckets/relative_position"]
    for key, bidirectional in (("bidirectional", True), ("causal", False)):
        got = relative_buckets(distance, bidirectional, 32, 128)
        unit_vectors.assert_equal("T5 relative buckets", f"t5_buckets/{key}", got)


@pytest.mark.needs("select/")
def test_selection_as_the_program(unit_vectors):
    select = jax.jit(fill_as_program, static_argnums=(1, 2, 3))
    for case in unit_vectors.cases("select/"):
        logits, want = unit_vectors[f"select/{case}/logits"], unit_vectors[f"select/{case}/index"]
        index, valid = select(logits, min(CAP, logits.shape[1]), THRESHOLD, MINIMUM)
        size = want.shape[1]
        unit_vectors.assert_equal("token selection (program)", f"select/{case}/index", index[:, :size])
        np.testing.assert_array_equal(valid, np.broadcast_to(np.arange(valid.shape[1]) < size, valid.shape))


@pytest.mark.needs("select/")
def test_selection_of_the_paper_is_the_programs_without_the_filling(unit_vectors):
    for case in unit_vectors.cases("select/"):
        logits, stored = unit_vectors[f"select/{case}/logits"], unit_vectors[f"select/{case}/index"]
        slots = min(CAP, logits.shape[1])
        index, valid = select_best(jnp.asarray(logits), jnp.ones(logits.shape, bool), slots, THRESHOLD, MINIMUM)
        count = (1 / (1 + np.exp(-logits.astype(np.float64))) >= THRESHOLD).sum(axis=1)
        for image, qualified in enumerate(count):
            order = np.argsort(-logits[image], kind="stable")
            want = order[: min(qualified, CAP) if qualified else MINIMUM]
            report.enter("token selection (paper)", unit_vectors.name, want, index[image][valid[image]], 0.0)
            np.testing.assert_array_equal(index[image][valid[image]], want)
            if qualified or not count.any():
                assert set(want) == set(stored[image][: len(want)])


@pytest.mark.needs("proposals/mask", "proposals/level_shapes", "proposals/valid")
def test_proposals(unit_vectors):
    units = unit_vectors
    mask = jnp.asarray(~units["proposals/mask"])
    shapes = level_shapes(units, "proposals/level_shapes")
    ratios = jnp.ones((len(mask), len(shapes), 2))  # proposals count cells
    boxes, valid = proposals(Memory(jnp.zeros((*mask.shape, 8)), mask, ratios, shapes))
    units.assert_equal("proposals", "proposals/valid", valid)
    units.assert_close("proposals", "proposals/boxes", np.where(valid[..., None], boxes, 1.0), 1e-6)
