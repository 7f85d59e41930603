"""Eq. 2 written out in numpy; absent texts; the ablations without L-to-V and without the aligner."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opendet_jax.model.aligner import Aligner, unit


@pytest.fixture(scope="module")
def inputs():
    hidden = jax.random.normal(jax.random.key(0), (2, 5, 32))
    texts = unit(jax.random.normal(jax.random.key(1), (2, 3, 32)))
    return hidden, texts.at[:, 2].set(0.0)


def test_equation(tiny, tiny_params, inputs):
    params = tiny_params["aligner_encoder"]
    hidden, texts = map(np.asarray, inputs)

    def linear(x, name):
        return x @ np.asarray(params[name]["kernel"]) + np.asarray(params[name]["bias"])

    v = linear(hidden, "v_to_l")
    v_to_l = (v / np.linalg.norm(v, axis=-1, keepdims=True)) @ texts.swapaxes(1, 2)
    l_to_v = linear(hidden, "query") @ linear(texts, "l_to_v").swapaxes(1, 2)
    got = Aligner(tiny).apply({"params": params}, *inputs)
    np.testing.assert_allclose(got, v_to_l + l_to_v, atol=1e-5)
    cosine, score = Aligner(tiny).apply({"params": params}, *inputs, method="cosine_and_score")
    np.testing.assert_allclose(cosine, v_to_l, atol=1e-5)
    np.testing.assert_array_equal(score, got)
    got = Aligner(tiny, l_to_v=False).apply({"params": {"v_to_l": params["v_to_l"]}}, *inputs)
    np.testing.assert_allclose(got, v_to_l, atol=1e-5)


def test_the_plain_one_is_a_dot_product_without_a_second_look(tiny, tiny_params, tiny_pyramids, inputs):
    """As in GenerateU. The cosine is said all the same."""
    params = {"params": {"v_to_l": tiny_params["aligner_encoder"]["v_to_l"]}}
    hidden, texts = map(np.asarray, inputs)
    weights = {name: np.asarray(value) for name, value in params["params"]["v_to_l"].items()}
    want = (hidden @ weights["kernel"] + weights["bias"]) @ texts.swapaxes(1, 2)
    aligner, looks = Aligner(tiny, l_to_v=False, plain=True), (tiny_pyramids[1], jnp.full((2, 5, 4), 0.4))
    np.testing.assert_allclose(aligner.apply(params, *inputs), want, atol=1e-5)
    cosine, score = aligner.apply(params, *inputs, *looks, method="cosine_and_score")
    np.testing.assert_allclose(score, want, atol=1e-5)
    np.testing.assert_allclose(cosine, Aligner(tiny, l_to_v=False).apply(params, *inputs), atol=1e-6)
    assert set(aligner.init(jax.random.key(0), *inputs, *looks)["params"]) == {"v_to_l"}


def test_parameters(tiny, inputs):
    with_both = Aligner(tiny).init(jax.random.key(0), *inputs)["params"]
    assert set(with_both) == {"v_to_l", "query", "l_to_v"}
    assert set(Aligner(tiny, l_to_v=False).init(jax.random.key(0), *inputs)["params"]) == {"v_to_l"}


def test_gradients_at_zero_vectors_are_finite(tiny, inputs):
    params = jax.tree.map(jnp.zeros_like, Aligner(tiny).init(jax.random.key(0), *inputs))
    grads = jax.grad(lambda p, h, t: Aligner(tiny).apply(p, h, t).sum(), argnums=(0, 1, 2))(params, *inputs)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads))


def test_refining_reads_the_boxes_and_keeps_gradients(tiny, tiny_params, tiny_pyramids, inputs):
    _, memory = tiny_pyramids
    boxes = jnp.full((2, 5, 4), 0.4)
    params = {"params": tiny_params["aligner_one_to_one"]}

    def score(hidden, boxes):
        return jnp.square(Aligner(tiny).apply(params, hidden, inputs[1], memory, boxes)).sum()

    for gradient in jax.jit(jax.grad(score, argnums=(0, 1)))(inputs[0], boxes):
        assert (jnp.abs(gradient).sum(axis=-1) > 0).all()
