"""The whole flow: sizes at full size, parameters, ablations, bfloat16, and gradients between its stages."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from opendet_jax.batch import Images, Objects
from opendet_jax.config import Ablation, ModelConfig
from opendet_jax.model.denoising import DenoisingRandoms, denoising_slots, draw_randoms
from opendet_jax.model.opendet import OpenDet, Training, init_params, normalise_pixels

STAGES = {
    "backbone",
    "neck",
    "encoder",
    "query_selection",
    "denoising",
    "decoder",
    "aligner_one_to_many",
    "aligner_one_to_one",
    "aligner_encoder",
    "distiller",
    "name_generator",
}


@pytest.fixture
def abstract():
    """eval_shape passes shapes through our dataclasses, whose fields otherwise insist on arrays."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def prompts_of(model: OpenDet, params, out: Training):
    """Of every query of the last layer."""
    seen = (out.decoded.hidden[-1], out.decoded.boxes[-1], out.features, out.memory)
    return model.apply({"params": params}, *seen, deterministic=True, method="distil").language


def shapes(tree):
    return jax.tree.map(lambda x: x.shape, tree)


def test_full_size(abstract):
    """Swin-T at 800 × 1344, two images, G = 100: N = 200, Q = 900."""
    config = ModelConfig()
    model = OpenDet(config)
    params = {"params": jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))}
    of = jax.ShapeDtypeStruct
    images = Images(pixels=of((2, 800, 1344, 3), jnp.uint8), mask=of((2, 800, 1344), bool))
    objects = Objects(
        boxes=of((2, 100, 4), jnp.float32),
        valid=of((2, 100), bool),
        texts=of((2, 100, 768), jnp.float32),
        tokens=of((2, 100, 32), jnp.int32),
    )
    slots = denoising_slots(config, 100)
    randoms = jax.eval_shape(lambda key: draw_randoms(key, 2, slots, 92), jax.random.key(0))
    training = jax.eval_shape(
        lambda *inputs: model.apply(*inputs, deterministic=True), params, images, objects, randoms
    )
    assert training.decoded.hidden.shape == (6, 2, 1100, 256)
    assert training.alignment.shape == (6, 2, 1100, 100)
    assert training.encoder_alignment.shape == (2, 900, 100)
    prompts = jax.eval_shape(lambda params, out: prompts_of(model, params, out), params["params"], training)
    assert prompts.shape == (2, 1100, 768)
    detected = jax.eval_shape(lambda *inputs: model.apply(*inputs, method=OpenDet.detect), params, images)
    assert detected.decoded.boxes.shape == (6, 2, 900, 4)
    assert detected.prompts.shape == (2, 900, 768)

    # jax_facts of the authors' program: 328.6 M live parameters with biases in the head
    total = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(params))
    assert 328e6 < total < 329e6


def test_init_makes_every_parameter(tiny, tiny_params):
    assert set(tiny_params) == STAGES
    assert "refine" in tiny_params["aligner_one_to_one"]
    assert "refine" not in tiny_params["aligner_one_to_many"]
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(tiny_params))


def test_normalise(tiny_images):
    pixels = np.asarray(normalise_pixels(tiny_images))
    want = (tiny_images.pixels - np.array([123.675, 116.28, 103.53])) / np.array([58.395, 57.12, 57.375])
    np.testing.assert_allclose(pixels, np.where(tiny_images.mask[..., None], want, 0), atol=1e-6)


@pytest.fixture(scope="module")
def randoms(tiny) -> DenoisingRandoms:
    return draw_randoms(jax.random.key(3), 2, denoising_slots(tiny, 4), tiny.denoising_labels)


def test_detecting_needs_no_training_parts(tiny, tiny_params, tiny_images):
    parts = STAGES - {"denoising", "aligner_one_to_many", "aligner_one_to_one", "aligner_encoder", "name_generator"}
    params = {name: tiny_params[name] for name in parts}
    detected = jax.jit(lambda p, images: OpenDet(tiny).apply({"params": p}, images, method=OpenDet.detect))(
        params, tiny_images
    )
    assert detected.prompts.shape == (2, 24, 32)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(detected))


def test_agreement_is_that_of_the_last_layer(tiny, tiny_params, tiny_images, tiny_objects):
    def both_ways(model: OpenDet):
        features, memory, queries = model.encode(tiny_images, deterministic=True)
        detected = model.decode(features, memory, queries)
        aligned = model.align(detected.decoded, jnp.asarray(tiny_objects.texts), memory, deterministic=True)
        return detected, aligned[-1], model.detect_and_align(tiny_images, jnp.asarray(tiny_objects.texts))

    want, aligned, (got, agreement) = jax.jit(lambda: OpenDet(tiny).apply({"params": tiny_params}, method=both_ways))()
    np.testing.assert_allclose(agreement.logits, aligned, atol=1e-6)
    np.testing.assert_allclose(got.prompts, want.prompts, atol=1e-6)
    assert (np.abs(agreement.cosine) <= 1 + 1e-6).all()
    assert np.std(agreement.cosine - agreement.logits) > 1e-3  # the second term


def test_an_image_does_not_depend_on_its_batch(tiny, tiny_params, tiny_images):
    detect = jax.jit(lambda images: OpenDet(tiny).apply({"params": tiny_params}, images, method=OpenDet.detect))
    together = detect(tiny_images)
    for image in range(2):
        alone = detect(jax.tree.map(lambda x, i=image: x[i : i + 1], tiny_images))
        np.testing.assert_array_equal(alone.queries.index[0], together.queries.index[image])
        np.testing.assert_allclose(alone.decoded.boxes[:, 0], together.decoded.boxes[:, image], atol=5e-6)
        np.testing.assert_allclose(alone.decoded.objectness[:, 0], together.decoded.objectness[:, image], atol=5e-5)
        np.testing.assert_allclose(alone.prompts[0], together.prompts[image], atol=5e-5)


@pytest.mark.parametrize(
    "ablation",
    [Ablation(object_detector=False), Ablation(distiller=False, l_to_v=False)],
    ids=["detector", "distiller-l_to_v"],
)
def test_ablations(tiny, tiny_images, tiny_objects, randoms, ablation, abstract):
    model = OpenDet(tiny, ablation)
    params = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    queries = tiny.max_queries if ablation.object_detector else tiny.min_queries
    out = jax.eval_shape(
        lambda p: model.apply({"params": p}, tiny_images, tiny_objects, randoms, deterministic=True), params
    )
    assert out.decoded.hidden.shape == (4, 2, 12 + queries, 32)
    assert jax.eval_shape(lambda p, out: prompts_of(model, p, out), params, out).shape == (2, 12 + queries, 32)
    assert set(params) == STAGES - (set() if ablation.object_detector else {"aligner_one_to_many"})
    if not ablation.distiller:
        assert set(params["distiller"]) == {"projection"}
        assert set(params["aligner_one_to_many"]) == {"v_to_l"}


@pytest.mark.parametrize("layers", [(0, 1), (1, 0), (1, 3)])
def test_other_numbers_of_layers(tiny, tiny_images, tiny_objects, randoms, layers, abstract):
    config = replace(tiny, one_to_many_layers=layers[0], one_to_one_layers=layers[1])
    model = OpenDet(config)
    params = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    out = jax.eval_shape(
        lambda p: model.apply({"params": p}, tiny_images, tiny_objects, randoms, deterministic=True), params
    )
    assert out.alignment.shape == (sum(layers), 2, 36, 4)


def test_bfloat16_is_finite(tiny, tiny_params, tiny_images, tiny_objects, randoms):
    model = OpenDet(replace(tiny, dtype="bfloat16"))
    out = jax.jit(
        lambda p: model.apply(
            {"params": p},
            tiny_images,
            tiny_objects,
            randoms,
            deterministic=False,
            rngs={"dropout": jax.random.key(0)},
        )
    )(tiny_params)
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves(out))
    assert out.decoded.hidden.dtype == jnp.bfloat16
    for x in (out.decoded.boxes, out.decoded.objectness, out.alignment, out.encoder_alignment):
        assert x.dtype == jnp.float32


def test_gradients_between_stages(tiny, tiny_params, tiny_images, tiny_objects, randoms):
    """Which stages each kind of output teaches; and no gradient is NaN where a whole batch has no object."""
    nobody = replace(tiny_objects, valid=np.zeros_like(tiny_objects.valid), texts=np.zeros_like(tiny_objects.texts))

    @jax.jit
    def gradients(which, objects):
        def value(params):
            out = OpenDet(tiny).apply({"params": params}, tiny_images, objects, randoms, deterministic=True)
            matching = out.decoded.hidden.shape[2] - tiny.max_queries
            kinds = (
                out.decoded.hidden[:, :, matching:, 0].sum() + out.decoded.boxes[:, :, matching:].sum(),
                out.queries.boxes.sum() + out.queries.objectness.sum() + out.encoder_alignment.sum(),
                out.decoded.hidden[:, :, :matching, 0].sum(),
                prompts_of(OpenDet(tiny), params, out)[:, matching:, 0].sum(),
                out.alignment[-1, :, matching:].sum(),
            )
            return jnp.stack(kinds)[which]

        return jax.grad(value)(tiny_params)

    def taught(which: int, objects=tiny_objects) -> set[str]:
        grads = gradients(which, objects)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads))
        return {name for name, part in grads.items() if any(np.any(x) for x in jax.tree.leaves(part))}

    trunk = {"backbone", "neck", "encoder"}
    assert taught(0) == trunk | {"decoder"}
    assert taught(1) == trunk | {"query_selection", "aligner_encoder"}
    assert taught(2) == trunk | {"decoder", "denoising"}
    assert taught(3) == trunk | {"decoder", "distiller"}
    assert taught(4) == trunk | {"decoder", "aligner_one_to_one"}
    for which in range(4):
        assert taught(which, nobody) >= trunk
    assert taught(4, nobody) == set()  # no text to align with
