"""A training step's forward and backward pass against the authors' program: matchings, losses, gradients.

Compared with its variants "clean" and "clean_same_order" (every image by its own objects). The gradient of each of
eight groups of losses is compared as well: the alignment term dominates the sum. Each file is a program of its own,
which takes minutes to compile.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from opendet_jax.compilation import compiler_options
from opendet_jax.losses.naming import text_sigma
from opendet_jax.losses.total import WEIGHTS
from opendet_jax.weights.open_det import OPENDET_RULES
from tests.parity import report
from tests.parity.kinks import at_kinks, find_kinks
from tests.parity.step import ProgramStep, program_terms, stored_terms
from tests.parity.vectors import Vectors

TERM, NORM, GROUP_NORM, ENTRY = 1e-5, 1e-4, 5e-4, 5e-4  # relative
SMALL, SMALL_NORM = 1e-3, 1e-6  # norms below 1e-3 of the global one are compared absolutely, 1e-6 of it

GROUPS = {
    "encoder": lambda term, of: of == "encoder",
    "denoising": lambda term, of: of.startswith("denoising") and term != "distillation",
    "align": lambda term, of: term == "alignment" and of.startswith("layer"),
    "objectness": lambda term, of: term in ("joint", "focal") and of.startswith("layer"),
    "boxes": lambda term, of: term in ("l1", "giou") and of.startswith("layer"),
    "distill": lambda term, of: term == "distillation",
    "names": lambda term, of: term == "naming",
    "text_noise": lambda term, of: term == "text_denoising",
}


@dataclass
class Step:
    """The loss terms, the object of each query of each set, and the pullback of the terms."""

    vectors: Vectors
    terms: dict[str, float]
    matched: dict[str, np.ndarray]  # B × Q
    pullback: Any
    swapped: "Step | None" = None


def swap_branches(params: dict[str, Any]) -> dict[str, Any]:
    """W_f with the rows of φ_B and φ_E exchanged: "clean" distils with the other order of the branches."""
    phi, phi_b, phi_e = np.split(params["distiller"]["fusion"]["kernel"], 3)
    return params | {"distiller": params["distiller"] | {"fusion": {"kernel": np.concatenate([phi, phi_e, phi_b])}}}


@pytest.fixture(scope="module")
def step(train_vectors) -> Step:
    program = ProgramStep(train_vectors)
    kinks = find_kinks(train_vectors.path)

    def losses(params):
        with at_kinks(kinks):
            training = program.forward(params)
            terms = program.losses(params, training)
        return terms, program.matched(training)

    options = compiler_options(jax.default_backend(), trains=True)
    forward = jax.jit(lambda params: jax.vjp(losses, params, has_aux=True), compiler_options=options)
    backward = jax.jit(lambda pull, cotangents: pull(cotangents)[0], compiler_options=options)

    def take(params) -> Step:
        terms, pull, matched = forward(params)
        return Step(
            vectors=train_vectors,
            terms={name: float(term) for name, term in terms.items()},
            matched={name: np.asarray(of) for name, of in matched.items()},
            pullback=lambda cotangents: backward(pull, cotangents),
        )

    return replace(take(program.params), swapped=take(swap_branches(program.params)))


def gradients(step: Step, wanted) -> dict[tuple[str, ...], np.ndarray]:
    """Of the weighted sum of the terms for which `wanted(term, set)`, by the path of the parameter."""
    cotangents = {}
    for name in step.terms:
        term, _, of = name.partition("/")
        weight = WEIGHTS[term] if term != "total" and wanted(term, of) else 0.0
        cotangents[name] = jnp.float32(weight)
    return flatten_dict(jax.tree.map(np.asarray, step.pullback(cotangents)))


def assert_norms_close(
    stage: str, vectors: Vectors, variant: str, key: str, got: dict[tuple[str, ...], np.ndarray], tolerance: float
) -> None:
    names, want = vectors[f"{variant}/grad/names"], vectors[key]
    paths = [tuple((OPENDET_RULES.place(str(name)).path or "").split("/")) for name in names]
    norms = np.array([np.linalg.norm(got[path].astype(np.float64)) for path in paths])
    others = set(got) - set(paths)
    assert all((got[path] == 0).all() for path in others), [p for p in others if (got[p] != 0).any()]
    whole = np.linalg.norm(want)
    large = want > SMALL * whole
    relative = np.abs(norms[large] / want[large] - 1)
    absolute = np.abs(norms - want)[~large] / whole
    report.enter_error(stage, vectors.name, absolute.max(initial=0.0), relative.max(), tolerance, is_relative=True)
    assert relative.max() <= tolerance, names[large][relative > tolerance]
    assert absolute.max(initial=0.0) <= SMALL_NORM, names[~large][absolute > SMALL_NORM]
    assert np.linalg.norm(norms) == pytest.approx(whole, rel=tolerance)


@pytest.mark.minutes
@pytest.mark.needs("clean_same_order/loss/names")
def test_matchings(step):
    """The same (query, object) pairs in every set; which copy of an object a query has does not matter."""
    for name, matched in step.matched.items():
        for image, objects in enumerate(matched):
            key = f"clean_same_order/match/{name}/{image}"
            want = sorted(zip(step.vectors[f"{key}/query"], step.vectors[f"{key}/object"], strict=True))
            got = [(q, objects[q]) for q in np.flatnonzero(objects >= 0)]
            assert got == want, key
            report.enter("matchings", step.vectors.name, want, got, 0.0)


@pytest.mark.minutes
@pytest.mark.needs("clean_same_order/loss/names", "clean/loss/names")
@pytest.mark.parametrize("variant", ["clean_same_order", "clean"])
def test_loss_terms(step, variant):
    got = step if variant == "clean_same_order" else step.swapped
    want = stored_terms(step.vectors[f"{variant}/loss/names"], step.vectors[f"{variant}/loss/unweighted"])
    ours = program_terms(got.terms)
    if variant == "clean":  # here the prompts themselves are as in the program's distillation loss
        ours = ours | {"naming": program_terms(step.terms)["naming"]}
    assert ours.keys() == want.keys()
    errors = {name: abs(ours[name] / want[name] - 1) for name in want}
    worst = max(errors, key=errors.__getitem__)
    absolute = max(abs(ours[name] - want[name]) for name in want)
    report.enter_error("loss terms", step.vectors.name, absolute, errors[worst], TERM, is_relative=True)
    assert errors[worst] <= TERM, worst
    if variant == "clean_same_order":
        total = float(step.vectors["clean_same_order/loss/total"])
        report.enter("total loss", step.vectors.name, total, got.terms["total"], TERM, relative=True)
        assert got.terms["total"] == pytest.approx(total, rel=TERM)


@pytest.mark.needs("text_noise/sigma")
def test_sigma_of_the_text_noise(train_vectors):
    texts, counts = jnp.asarray(train_vectors["objects/texts"]), train_vectors["objects/count"]
    valid = jnp.asarray(np.arange(texts.shape[1]) < counts[:, None])
    sigma = text_sigma(texts, valid, "padded")
    train_vectors.assert_close("text noise σ", "text_noise/sigma", sigma, 1e-6)


@pytest.mark.needs("clean/loss/weights")
def test_weights_of_the_terms(train_vectors):
    ours = {"loss_bbox": "l1", "loss_giou": "giou", "loss_bce": "joint", "loss_ce": "alignment"}
    for name, weight in zip(train_vectors["clean/loss/names"], train_vectors["clean/loss/weights"], strict=True):
        term = ours.get("_".join(str(name).split("_")[:2]))
        if term:
            assert WEIGHTS[term] == weight, name
    assert all(WEIGHTS[term] == 1 for term in ("joint", "focal", "distillation", "naming", "text_denoising"))


@pytest.mark.minutes
@pytest.mark.needs("clean_same_order/grad/norms")
def test_gradient_of_the_total(step):
    variant, vectors = "clean_same_order", step.vectors
    got = gradients(step, lambda term, of: True)
    assert_norms_close("gradient norms of the total", vectors, variant, f"{variant}/grad/norms", got, NORM)

    for name in vectors.cases(f"{variant}/grad/of/"):
        path, layout, _ = OPENDET_RULES.place(name)
        assert path is not None
        key = f"{variant}/grad/of/{name}"
        want, ours = vectors.pair(key, layout.theirs(got[tuple(path.split("/"))]))
        largest = np.abs(want).max()
        error = np.abs(want - ours).max()
        report.enter_error("gradient entries", vectors.name, error, error / largest, ENTRY, is_relative=True)
        assert error <= ENTRY * largest, name


@pytest.mark.minutes
@pytest.mark.needs("clean/grad/group/")
@pytest.mark.parametrize("group", GROUPS)
def test_gradient_of_each_group(step, group):
    """Which losses reach which parameters: every gradient stop of the method."""
    own = step.swapped if group == "distill" else step
    got = gradients(own, GROUPS[group])
    stage, key = "gradient norms of the eight groups", f"clean/grad/group/{group}"
    assert_norms_close(stage, step.vectors, "clean", key, got, GROUP_NORM)
    value = sum(
        WEIGHTS[name.split("/")[0]] * term
        for name, term in own.terms.items()
        if name != "total" and GROUPS[group](name.split("/")[0], name.partition("/")[2])
    )
    assert value == pytest.approx(float(step.vectors[f"clean/loss/group/{group}"]), rel=TERM)
