"""Where gradients stop between layers, who is seen, and the ablation without decoupling."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opendet_jax.config import Ablation
from opendet_jax.model.decoder import Decoder


@pytest.fixture(scope="module")
def inputs(tiny_pyramids):
    content = jax.random.normal(jax.random.key(0), (2, 10, 32))
    boxes = jax.random.uniform(jax.random.key(1), (2, 10, 4), minval=0.2, maxval=0.8)
    return content, boxes, tiny_pyramids[1], jnp.ones((2, 10, 10), bool)


@pytest.fixture(scope="module")
def gradients(tiny, tiny_params, inputs):
    """What a layer's boxes or scores reach: gradients with respect to parameters, content and first boxes."""
    _, _, memory, sees = inputs

    @jax.jit
    def gradients(weights):
        def value(params, content, boxes):
            out = Decoder(tiny).apply({"params": params}, content, boxes, memory, sees)
            values = (out.hidden, out.boxes, out.objectness)
            return sum((w * v.reshape(4, -1).sum(axis=1)).sum() for w, v in zip(weights, values, strict=True))

        return jax.grad(value, argnums=(0, 1, 2))(tiny_params["decoder"], *inputs[:2])

    def of(field: str, layer: int):
        fields = ("hidden", "boxes", "objectness")
        return gradients(jnp.zeros((3, 4)).at[fields.index(field), layer - 1].set(1.0))

    return of


def size(tree) -> float:
    return sum(float(np.abs(x).sum()) for x in jax.tree.leaves(tree))


def test_content_is_stopped_between_the_groups(gradients):
    for field in ("hidden", "objectness"):
        params, content, _ = gradients(field, 3)
        for name in ("layers_0", "layers_1", "box_head_one_to_many", "binary_head_one_to_many"):
            assert size(params[name]) == 0, name
        assert size(content) == 0
        assert size(params["layers_2"]) > 0
        params, content, _ = gradients(field, 2)
        assert size(params["layers_0"]) > 0
        assert size(content) > 0
        assert size(params["layers_2"]) == 0


def test_boxes_look_forward_one_step(gradients):
    params, content, _ = gradients("boxes", 3)  # d_3 and d_2, which is a one-to-many layer's
    assert size(params["box_head_one_to_many"]) > 0
    assert size(params["layers_1"]) > 0
    assert size(params["layers_0"]) > 0  # through the content of layer 2, not through d_1
    assert size(content) > 0
    params, content, _ = gradients("boxes", 4)  # d_4 and d_3
    assert size(params["box_head_one_to_many"]) == 0
    assert size(params["layers_1"]) == 0
    assert size(content) == 0
    assert size(params["box_head_one_to_one"]) > 0


def test_first_boxes_get_no_gradient(gradients):
    for layer in (1, 2, 3, 4):
        for field in ("hidden", "boxes", "objectness"):
            assert size(gradients(field, layer)[2]) == 0


def test_rows_that_see_nothing_are_finite(tiny, tiny_params, inputs):
    content, boxes, memory, _ = inputs
    out = jax.jit(Decoder(tiny).apply)(
        {"params": tiny_params["decoder"]}, content, boxes, memory, jnp.zeros((2, 10, 10), bool)
    )
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(out))


def test_unseen_queries_influence_nothing(tiny, tiny_params, inputs):
    content, boxes, memory, _ = inputs
    real = jnp.arange(10) < jnp.array([[7], [4]])
    sees = jnp.broadcast_to(real[:, None], (2, 10, 10))

    @jax.jit
    def run(content, boxes):
        def value(params):
            out = Decoder(tiny).apply({"params": params}, content, boxes, memory, sees)
            kept = jax.tree.map(lambda x: jnp.where(real.reshape(real.shape + (1,) * (x.ndim - 3)), x, 0), out)
            return sum(jnp.square(x).sum() for x in jax.tree.leaves(kept)), kept

        return jax.grad(value, has_aux=True)(tiny_params["decoder"])

    other = run(jnp.where(real[..., None], content, 50.0), jnp.where(real[..., None], boxes, 0.01))
    for a, b in zip(jax.tree.leaves(run(content, boxes)), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


def test_without_decoupling_every_layer_is_one_to_one(tiny, inputs):
    decoder = Decoder(tiny, Ablation(object_detector=False))
    out, variables = jax.jit(decoder.init_with_output)(jax.random.key(0), *inputs)
    params = variables["params"]
    assert out.hidden.shape == (4, 2, 10, 32)
    assert "box_head_one_to_many" not in params
    assert "binary_head_one_to_many" not in params
    for layer in range(4):
        assert set(params[f"layers_{layer}"]) == {"cross_attn", "norm1", "self_attn", "norm2", "ffn", "norm3"}
    content, *rest = inputs
    gradient = jax.jit(jax.grad(lambda c: decoder.apply(variables, c, *rest).hidden[-1].std()))(content)
    assert size(gradient) > 0  # nothing is stopped between layers


def test_recomputing_activations_changes_no_parameter(tiny, inputs):
    plain, recomputed = (
        jax.eval_shape(Decoder(replace(tiny, remat=remat)).init, jax.random.key(0), *inputs) for remat in (False, True)
    )
    assert jax.tree.map(lambda x: x.shape, plain) == jax.tree.map(lambda x: x.shape, recomputed)
