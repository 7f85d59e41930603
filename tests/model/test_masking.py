"""Padding influences nothing, to the last bit: pixels, objects and queries, in outputs and in gradients."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opendet_jax.batch import Images, Objects
from opendet_jax.model.denoising import denoising_slots, draw_randoms
from opendet_jax.model.distiller import Distiller
from opendet_jax.model.opendet import OpenDet
from tests.model.test_opendet import prompts_of


def assert_identical(a, b) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def train(tiny, tiny_params):
    """Outputs of the training pass where they are real, and the gradient of all of them together."""
    config = replace(tiny, score_threshold=0.5, max_queries=120)  # more slots than tokens pass: some are empty
    randoms = draw_randoms(jax.random.key(3), 2, denoising_slots(config, 4), config.denoising_labels)

    @jax.jit
    def train(images: Images, objects: Objects):
        def value(params):
            out = OpenDet(config).apply({"params": params}, images, objects, randoms, deterministic=True)
            real = jnp.concatenate([out.denoising.valid, out.queries.valid], axis=1)
            texts = jnp.asarray(objects.valid)[:, None]

            def rows(x, mask=real):  # [..., B, K, *] → 0 where the query is none
                return jnp.where(mask.reshape(mask.shape + (1,) * (x.ndim - 3)), x, 0.0)

            kept = (
                rows(out.decoded.hidden),
                rows(out.decoded.boxes),
                rows(out.decoded.objectness),
                jnp.where(real[..., None] & texts, out.alignment, 0.0),
                jnp.where(out.queries.valid[..., None] & texts, out.encoder_alignment, 0.0),
                rows(out.queries.boxes[None], out.queries.valid),
                rows(prompts_of(OpenDet(config), params, out)[None]),
            )
            return sum(jnp.sin(x).sum() for x in kept), (kept, out.queries.valid)

        return jax.grad(value, has_aux=True)(tiny_params)

    return train


def test_some_slots_are_empty(train, tiny_images, tiny_objects):
    _, (_, valid) = train(tiny_images, tiny_objects)
    assert valid.any(axis=1).all()
    assert not valid.all(axis=1).any()


def test_hidden_pixels(train, tiny_images, tiny_objects):
    spoilt = replace(tiny_images, pixels=np.where(tiny_images.mask[..., None], tiny_images.pixels, np.uint8(255)))
    assert_identical(train(tiny_images, tiny_objects), train(spoilt, tiny_objects))


def test_padded_objects(train, tiny_images, tiny_objects):
    real = tiny_objects.valid[..., None]
    spoilt = replace(
        tiny_objects,
        boxes=np.where(real, tiny_objects.boxes, np.float32(9.0)),
        texts=np.where(real, tiny_objects.texts, np.float32(-3.0)),
        tokens=np.where(real, tiny_objects.tokens, 7).astype(np.int32),
    )
    assert_identical(train(tiny_images, tiny_objects), train(tiny_images, spoilt))


def test_empty_slots_in_the_distiller(tiny, tiny_params, tiny_pyramids):
    """The decoder's empty slots: tests/model/test_decoder.py."""
    features, memory = tiny_pyramids
    hidden = jax.random.normal(jax.random.key(0), (2, 6, 32))
    boxes = jnp.full((2, 6, 4), 0.4)
    real = (jnp.arange(6) < jnp.array([[4], [2]]))[..., None]

    @jax.jit
    def run(hidden, boxes):
        def value(params, tokens):
            seen = features.replace(tokens=tokens[0]), memory.replace(tokens=tokens[1])
            prompts = Distiller(tiny).apply({"params": params}, hidden, boxes, *seen).language
            kept = jnp.where(real, prompts, 0.0)
            return jnp.sin(kept).sum(), kept

        tokens = jnp.stack([features.tokens, memory.tokens])
        return jax.grad(value, argnums=(0, 1), has_aux=True)(tiny_params["distiller"], tokens)

    assert_identical(run(hidden, boxes), run(jnp.where(real, hidden, 40.0), jnp.where(real, boxes, 0.9)))


def test_hidden_tokens_of_a_pyramid(tiny, tiny_params, tiny_pyramids):
    features, memory = tiny_pyramids
    hidden, boxes = jax.random.normal(jax.random.key(0), (2, 6, 32)), jnp.full((2, 6, 4), 0.8)

    @jax.jit
    def run(filling):
        seen = [p.replace(tokens=jnp.where(p.valid[..., None], p.tokens, filling)) for p in (features, memory)]

        def value(params):
            prompts = Distiller(tiny).apply({"params": params}, hidden, boxes, *seen).language
            return jnp.sin(prompts).sum(), prompts

        return jax.grad(value, has_aux=True)(tiny_params["distiller"])

    assert_identical(run(0.0), run(30.0))
