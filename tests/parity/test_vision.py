"""Backbone, neck and encoder against the authors' numbers: as a whole, and each on the stored output before it."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from opendet_jax.config import ModelConfig, SwinConfig
from opendet_jax.model.encoder import Encoder, EncoderLayer
from opendet_jax.model.neck import Neck
from opendet_jax.model.swin import Swin
from opendet_jax.weights.detector import ENCODER_RULES, NECK_RULES
from opendet_jax.weights.rules import convert
from opendet_jax.weights.swin import SWIN_RULES
from tests.parity.vectors import Vectors, state_dict

STAGE, FEATURES = 1e-5, 5e-5
MEAN, STD = np.float32([123.675, 116.28, 103.53]), np.float32([58.395, 57.12, 57.375])
CASES = ["eval_a", "eval_b", "eval_pad"]


@pytest.fixture(scope="module", params=CASES)
def vectors(request, vectors_folder):
    return Vectors(vectors_folder / f"{request.param}.npz")


@pytest.fixture(scope="module")
def params(vectors_folder):
    """Everything of the checkpoint that these three parts use."""
    state = state_dict(vectors_folder, Vectors(vectors_folder / "eval_a.npz"))
    parts = (
        "detr.detr.backbone.",
        "detr.detr.input_proj.",
        "detr.detr.transformer.level_embed",
        "detr.detr.transformer.encoder.",
    )
    state = {name: value for name, value in state.items() if name.startswith(parts)}
    return convert(state, SWIN_RULES + NECK_RULES + ENCODER_RULES)


def images(vectors):
    """Normalised pixels, zero where padded: [B, H, W, 3]."""
    out = np.zeros((*vectors["input/mask"].shape, 3), np.float32)
    for i in range(len(out)):
        pixels = vectors[f"input/pixels_{i}"].transpose(1, 2, 0)
        out[i, : pixels.shape[0], : pixels.shape[1]] = (pixels - MEAN) / STD
    return jnp.asarray(out)


def channels_first(x):
    return np.asarray(x).transpose(0, 3, 1, 2)


def level(features, index):
    """One level of the tokens as the authors keep it: [B, D, h, w]."""
    sizes = [h * w for h, w in features.level_shapes]
    start = sum(sizes[:index])
    tokens = np.asarray(features.tokens)[:, start : start + sizes[index]]
    return channels_first(tokens.reshape(len(tokens), *features.level_shapes[index], -1))


def run_encoder(params, features):
    """The tokens after each layer."""
    memory, state = Encoder(ModelConfig()).apply(
        {"params": params["encoder"]}, features, capture_intermediates=lambda m, _: isinstance(m, EncoderLayer)
    )
    layers = state["intermediates"]
    assert np.array_equal(memory.tokens, layers["layers_5"]["__call__"][0])
    return [layers[f"layers_{i}"]["__call__"][0] for i in range(6)]


def test_backbone_neck_and_encoder(vectors, params):
    normalised = images(vectors)
    vectors.assert_close("input/normalised", channels_first(normalised), 1e-6)

    maps = Swin(SwinConfig()).apply({"params": params["backbone"]}, normalised)
    for name, out in zip(("c3", "c4", "c5"), maps, strict=True):
        vectors.assert_close(f"backbone/{name}", channels_first(out), STAGE)

    features = Neck(256).apply({"params": params["neck"]}, maps, jnp.asarray(~vectors["input/mask"]))
    assert np.array_equal(features.level_shapes, vectors["input/level_shapes"])
    np.testing.assert_allclose(features.valid_ratios, vectors["input/valid_ratios"], atol=1e-7)
    for i in range(4):
        vectors.assert_close(f"neck/level_{i}", level(features, i), FEATURES)

    for i, out in enumerate(run_encoder(params, features)):
        vectors.assert_close(f"encoder/layer_{i + 1}", out, FEATURES)


def test_neck_and_encoder_from_stored_inputs(vectors_folder, params):
    vectors = Vectors(vectors_folder / "eval_a.npz")
    maps = [jnp.asarray(vectors[f"backbone/{name}"]).transpose(0, 2, 3, 1) for name in ("c3", "c4", "c5")]
    features = Neck(256).apply({"params": params["neck"]}, maps, jnp.asarray(~vectors["input/mask"]))
    for i in range(4):
        vectors.assert_close(f"neck/level_{i}", level(features, i), STAGE)
    stored = [vectors[f"neck/level_{i}"].reshape(1, 256, -1).transpose(0, 2, 1) for i in range(4)]
    features = dataclasses.replace(features, tokens=jnp.concatenate(stored, 1))
    for i, out in enumerate(run_encoder(params, features)):
        vectors.assert_close(f"encoder/layer_{i + 1}", out, STAGE)
