"""Where the distiller's gradients go, and which prompts get which dropout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opendet_jax.model.distiller import DirectPrompts, Distiller, Projection


@pytest.fixture(scope="module")
def inputs(tiny_pyramids):
    hidden = jax.random.normal(jax.random.key(0), (2, 5, 32))
    return hidden, jnp.full((2, 5, 4), 0.4), *tiny_pyramids


def test_queries_are_stopped_in_the_branches_only(tiny, tiny_params, inputs):
    hidden, boxes, features, memory = inputs
    params = tiny_params["distiller"]

    def value(hidden, boxes, b_feat, e_feat):
        pyramids = features.replace(tokens=b_feat), memory.replace(tokens=e_feat)
        return Distiller(tiny).apply({"params": params}, hidden, boxes, *pyramids).language[..., 0].sum()

    got = jax.jit(jax.grad(value, argnums=(0, 1, 2, 3)))(hidden, boxes, features.tokens, memory.tokens)

    def direct(hidden):
        fusion = jnp.asarray(params["fusion"]["kernel"])[: tiny.text_width, 0]
        return (Projection(tiny).apply({"params": params["phi"]}, hidden, deterministic=True) @ fusion).sum()

    np.testing.assert_allclose(got[0], jax.grad(direct)(hidden), atol=1e-5)
    for gradient in got[1:]:
        assert jnp.abs(gradient).sum() > 0


def test_dropout(tiny, tiny_params, inputs):
    apply = jax.jit(Distiller(tiny).apply, static_argnames="deterministic")
    params = {"params": tiny_params["distiller"]}
    still = apply(params, *inputs, deterministic=True)
    np.testing.assert_array_equal(still.distilled, still.language)
    noisy = apply(params, *inputs, deterministic=False, rngs={"dropout": jax.random.key(0)})
    again = apply(params, *inputs, deterministic=False, rngs={"dropout": jax.random.key(0)})
    np.testing.assert_array_equal(noisy.language, again.language)
    assert jnp.abs(noisy.distilled - noisy.language).max() > 0.01
    assert jnp.abs(noisy.distilled - still.distilled).max() > 0.01


def test_without_the_distiller_queries_are_projected(tiny, inputs):
    prompts, variables = DirectPrompts(tiny).init_with_output(jax.random.key(0), *inputs)
    projection = variables["params"]["projection"]
    np.testing.assert_allclose(prompts.language, inputs[0] @ projection["kernel"] + projection["bias"], atol=1e-6)
    np.testing.assert_array_equal(prompts.distilled, prompts.language)
