"""Backbone, neck and encoder against the authors' numbers: as a whole, and each on the stored output before it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opendet_jax.config import ModelConfig, SwinConfig
from opendet_jax.model.encoder import Encoder, EncoderLayer
from opendet_jax.model.neck import Neck
from opendet_jax.model.swin import Swin
from tests.parity.vectors import MODEL, STAGE, Vectors, params_of

MEAN, STD = np.float32([123.675, 116.28, 103.53]), np.float32([58.395, 57.12, 57.375])
LEVELS, LAYERS = range(4), range(1, 7)
NECK = tuple(f"neck/level_{level}" for level in LEVELS)


def images(vectors: Vectors) -> jax.Array:
    """Normalised pixels, zero where padded: [B, H, W, 3]."""
    out = np.zeros((*vectors["input/mask"].shape, 3), np.float32)
    for i in range(len(out)):
        pixels = vectors[f"input/pixels_{i}"].transpose(1, 2, 0)
        out[i, : pixels.shape[0], : pixels.shape[1]] = (pixels - MEAN) / STD
    return jnp.asarray(out)


def channels_first(x) -> np.ndarray:
    return np.asarray(x).transpose(0, 3, 1, 2)


def assert_levels(vectors: Vectors, features, atol: float) -> None:
    """Each level of the tokens as the authors keep it: [B, D, h, w]."""
    start = 0
    for level, (height, width) in enumerate(features.level_shapes):
        tokens = np.asarray(features.tokens)[:, start : start + height * width]
        start += height * width
        out = channels_first(tokens.reshape(len(tokens), height, width, -1))
        if level < 3:
            vectors.assert_close("neck, strides 8–32", f"neck/level_{level}", out, atol)
        else:  # GroupNorm over very few cells: the authors' own float32 is 2e-5 off
            vectors.assert_close("neck, stride 64", f"neck/level_{level}", out, MODEL)


def assert_encoder(vectors: Vectors, params, features, atol: float) -> None:
    def run(params, features):
        _, state = Encoder(ModelConfig()).apply(
            {"params": params}, features, capture_intermediates=lambda m, _: isinstance(m, EncoderLayer)
        )
        return [state["intermediates"][f"layers_{layer - 1}"]["__call__"][0] for layer in LAYERS]

    for layer, out in zip(LAYERS, jax.jit(run)(params["encoder"], features), strict=True):
        vectors.assert_close("encoder layers", f"encoder/layer_{layer}", out, atol)


def run_neck(vectors: Vectors, params, maps):
    return jax.jit(Neck(256).apply)({"params": params["neck"]}, maps, jnp.asarray(~vectors["input/mask"]))


def test_backbone_neck_and_encoder(eval_vectors):
    vectors = eval_vectors
    params = params_of(vectors, "backbone", "neck", "encoder")
    normalised = images(vectors)
    vectors.assert_close("normalised input", "input/normalised", channels_first(normalised), 1e-6)
    maps = jax.jit(Swin(SwinConfig()).apply)({"params": params["backbone"]}, normalised)
    for name, out in zip(("c3", "c4", "c5"), maps, strict=True):
        vectors.assert_close("backbone C3–C5", f"backbone/{name}", channels_first(out), STAGE)
    features = run_neck(vectors, params, maps)
    assert np.array_equal(features.level_shapes, vectors["input/level_shapes"])
    np.testing.assert_allclose(features.valid_ratios, vectors["input/valid_ratios"], atol=1e-7)
    assert_levels(vectors, features, MODEL)
    assert_encoder(vectors, params, features, MODEL)


@pytest.mark.needs("backbone/c3", "backbone/c4", "backbone/c5", *NECK)
def test_neck_and_encoder_from_stored_inputs(eval_vectors):
    vectors = eval_vectors
    params = params_of(vectors, "neck", "encoder")
    maps = [jnp.asarray(vectors[f"backbone/{name}"]).transpose(0, 2, 3, 1) for name in ("c3", "c4", "c5")]
    features = run_neck(vectors, params, maps)
    assert_levels(vectors, features, STAGE)
    stored = [vectors[key].reshape(*vectors[key].shape[:2], -1).transpose(0, 2, 1) for key in NECK]
    features = dataclasses.replace(features, tokens=jnp.concatenate(stored, 1))
    assert_encoder(vectors, params, features, STAGE)
