"""Building blocks: dtypes, starting values, and that what is not valid influences nothing."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from opendet_jax.batch import Images
from opendet_jax.model.layers import (
    MLP,
    DeformableAttention,
    FeedForward,
    LayerNorm,
    Pyramid,
    offset_ring,
    reference_per_level,
)
from opendet_jax.model.opendet import OpenDet

SHAPES = ((4, 5), (2, 3), (1, 2), (1, 1))
TOKENS = sum(h * w for h, w in SHAPES)
WIDTH, HEADS, POINTS = 16, 4, 2


def pyramid(seed=0, batch=2):
    rng = np.random.default_rng(seed)
    valid = jnp.asarray(rng.uniform(size=(batch, TOKENS)) < 0.7)
    tokens = jnp.asarray(rng.normal(size=(batch, TOKENS, WIDTH)), jnp.float32)
    return Pyramid(tokens, valid, jnp.ones((batch, 4, 2)), SHAPES)


def test_layer_norm_equals_pytorch():
    x = np.random.default_rng(0).normal(3.0, 2.0, (5, 24)).astype(np.float32)
    layer = torch.nn.LayerNorm(24)
    got = LayerNorm().apply({"params": {"scale": jnp.ones(24), "bias": jnp.zeros(24)}}, jnp.asarray(x))
    np.testing.assert_allclose(got, layer(torch.from_numpy(x)).detach().numpy(), atol=1e-6)


def test_layer_norm_of_bfloat16_is_computed_in_float32():
    x = jnp.asarray(np.random.default_rng(0).normal(100.0, 1.0, (3, 64)), jnp.bfloat16)
    params = LayerNorm().init(jax.random.key(0), x)
    half, full = LayerNorm(jnp.bfloat16).apply(params, x), LayerNorm().apply(params, x.astype(jnp.float32))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_array_equal(half, full.astype(jnp.bfloat16))


def test_mlp_with_zero_last_starts_at_zero():
    x = jnp.ones((2, 3, 8))
    params = MLP((16, 16, 4), zero_last=True).init(jax.random.key(0), x)
    assert set(params["params"]) == {"layers_0", "layers_1", "layers_2"}
    assert not np.any(np.asarray(MLP((16, 16, 4), zero_last=True).apply(params, x)))
    assert np.any(np.asarray(MLP((16, 16, 4)).init_with_output(jax.random.key(0), x)[0]))


def test_feed_forward_drops_only_in_training():
    x = jnp.ones((2, 3, 8))
    module = FeedForward(8, 32, dropout=0.5)
    params = module.init(jax.random.key(0), x)
    first, second = (module.apply(params, x, deterministic=False, rngs={"dropout": jax.random.key(i)}) for i in (1, 2))
    assert np.any(np.asarray(first != second))
    np.testing.assert_array_equal(module.apply(params, x), module.apply(params, x, deterministic=True))


def test_offset_ring():
    ring = offset_ring(8, 2, 3).reshape(8, 2, 3, 2)
    np.testing.assert_allclose(ring[0, 0], [[1, 0], [2, 0], [3, 0]], atol=1e-6)
    np.testing.assert_allclose(ring[1, 1, 1], [2, 2], atol=1e-6)
    np.testing.assert_allclose(ring[6, 0, 0], [0, -1], atol=1e-6)


def test_reference_per_level_scales_points_and_boxes():
    ratios = jnp.asarray([[[0.5, 0.25], [1.0, 0.5]]])
    box = jnp.asarray([[[0.2, 0.4, 0.6, 0.8]]])
    np.testing.assert_allclose(
        reference_per_level(box, ratios)[0, 0], [[0.1, 0.1, 0.3, 0.2], [0.2, 0.2, 0.6, 0.4]], rtol=1e-6
    )
    np.testing.assert_allclose(reference_per_level(box[..., :2], ratios)[0, 0], [[0.1, 0.1], [0.2, 0.2]], rtol=1e-6)


def test_where_points_and_boxes_look(monkeypatch):
    """r + Δ / (w, h) around a point, centre + Δ / P · size / 2 in a box (docs/method.md#2-backbone-neck-encoder)."""
    seen = []

    def capture(value, level_shapes, locations, weights):
        seen.append(np.asarray(locations))
        return jnp.zeros((*locations.shape[:2], WIDTH))

    monkeypatch.setattr("opendet_jax.model.layers.deformable_attention", capture)
    query = jax.random.normal(jax.random.key(1), (2, 5, WIDTH))
    reference = jax.random.uniform(jax.random.key(2), (2, 5, 4, 4))
    module = DeformableAttention(WIDTH, HEADS, 4, POINTS)
    params = module.init(jax.random.key(3), query, reference, pyramid())
    kernel = jax.random.normal(jax.random.key(4), params["params"]["sampling_offsets"]["kernel"].shape)
    params["params"]["sampling_offsets"]["kernel"] = kernel
    seen.clear()
    module.apply(params, query, reference[..., :2], pyramid())
    module.apply(params, query, reference, pyramid())
    ring = offset_ring(HEADS, 4, POINTS)
    offsets = np.asarray(query @ kernel + ring).reshape(2, 5, HEADS, 4, POINTS, 2)
    for image, q, head, level, point in np.ndindex(offsets.shape[:-1]):
        h, w = SHAPES[level]
        x, y, box_w, box_h = np.asarray(reference[image, q, level])
        dx, dy = offsets[image, q, head, level, point]
        place = (image, q, head, level, point)
        np.testing.assert_allclose(seen[0][place], [x + dx / w, y + dy / h], rtol=1e-4, atol=1e-5)
        wanted = [x + dx / POINTS * box_w / 2, y + dy / POINTS * box_h / 2]
        np.testing.assert_allclose(seen[1][place], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [2, 4])
def test_deformable_attention_never_reads_what_is_not_valid(size):
    source = pyramid()
    query = jax.random.normal(jax.random.key(1), (2, 5, WIDTH))
    reference = jax.random.uniform(jax.random.key(2), (2, 5, 4, size))
    module = DeformableAttention(WIDTH, HEADS, 4, POINTS)
    params = module.init(jax.random.key(3), query, reference, source)

    def total(params, tokens):
        out = module.apply(params, query, reference, source.replace(tokens=tokens))
        return (out**2).sum(), out

    run = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))
    hidden = jnp.where(source.valid[..., None], source.tokens, 1e4)
    (_, out), gradients = run(params, source.tokens)
    (_, same), (to_params, to_tokens) = run(params, hidden)
    np.testing.assert_array_equal(out, same)
    jax.tree.map(np.testing.assert_array_equal, gradients[0], to_params)
    assert not np.any(np.asarray(to_tokens)[~np.asarray(source.valid)])


def test_deformable_attention_starts_as_a_mean_over_the_ring():
    source = pyramid()
    query, reference = jnp.ones((2, 5, WIDTH)), jnp.full((2, 5, 4, 2), 0.5)
    params = DeformableAttention(WIDTH, HEADS, 4, POINTS).init(jax.random.key(0), query, reference, source)["params"]
    assert not np.any(np.asarray(params["sampling_offsets"]["kernel"]))
    np.testing.assert_array_equal(params["sampling_offsets"]["bias"], offset_ring(HEADS, 4, POINTS))
    assert not np.any(np.asarray(params["attention_weights"]["kernel"]))
    assert not np.any(np.asarray(params["attention_weights"]["bias"]))


def test_deformable_attention_in_bfloat16():
    source = pyramid()
    query, reference = jnp.ones((2, 5, WIDTH), jnp.bfloat16), jnp.full((2, 5, 4, 2), 0.5)
    module = DeformableAttention(WIDTH, HEADS, 4, POINTS, jnp.bfloat16)
    params = module.init(jax.random.key(0), query, reference, source)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    out = module.apply(params, query, reference, source.replace(tokens=source.tokens.astype(jnp.bfloat16)))
    assert out.dtype == jnp.bfloat16
    full = DeformableAttention(WIDTH, HEADS, 4, POINTS).apply(params, query.astype(jnp.float32), reference, source)
    np.testing.assert_allclose(out.astype(jnp.float32), full, atol=0.05)


WAYS = {"kept": {}, "products": {"remat": True, "remat_keeps": "products"}, "nothing": {"remat": True}}


def residuals(function, params) -> int:
    """Bytes that the backward pass of `function` reads, parameters included; nothing is computed."""
    pull = jax.eval_shape(lambda params: jax.vjp(function, params)[1], params)
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(pull))


def backbone(model, params, images):
    return model.apply({"params": params}, images.pixels / 255, method=lambda model, x: model.backbone(x, True))


def encoder(model, params, images):
    def encode(model, images):
        stop = jax.lax.stop_gradient  # of the backbone nothing is kept
        return model.encoder(jax.tree.map(stop, model.neck(model.backbone(images.pixels / 255, True), images.mask)))

    return model.apply({"params": params}, images, method=encode).tokens


def decoder(model, params, images):
    def decode(model, images):
        _, memory, queries = jax.tree.map(jax.lax.stop_gradient, model.encode(images, True))
        sees = jnp.ones((*queries.valid.shape, queries.valid.shape[1]), bool)
        return model.decoder(queries.content, queries.boxes, memory, sees).hidden

    return model.apply({"params": params}, images, method=decode)


@pytest.mark.parametrize("part", [backbone, encoder, decoder])
def test_less_is_kept(tiny, tiny_params, tiny_images: Images, part):
    images = jax.tree.map(jnp.asarray, tiny_images)
    sizes = {
        way: residuals(lambda params: part(OpenDet(replace(tiny, **fields)), params, images), tiny_params)  # noqa: B023
        for way, fields in WAYS.items()
    }
    assert sizes["nothing"] < sizes["products"] < sizes["kept"]
