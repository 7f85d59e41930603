"""A model small enough to compile in seconds, with every part of the large one."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opendet_jax.batch import Images, Objects
from opendet_jax.config import ModelConfig, SwinConfig, T5Config
from opendet_jax.model.encoder import Memory
from opendet_jax.model.neck import Features
from opendet_jax.model.opendet import OpenDet, init_params

TINY = ModelConfig(
    backbone=SwinConfig(embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8), window_size=4),
    t5=T5Config(vocab_size=24, num_layers=1, num_heads=2, head_width=16, ffn_width=32, lora_rank=4),
    width=32,
    text_width=32,
    num_heads=4,
    num_points=2,
    ffn_width=48,
    encoder_layers=1,
    one_to_many_layers=2,
    one_to_one_layers=2,
    max_queries=24,
    min_queries=6,
    denoising_queries=12,
    distiller_points=3,
    distiller_blocks=1,
    distiller_hidden=40,
)
SHALLOW = replace(TINY, one_to_many_layers=1, one_to_one_layers=1)  # for training steps: a quarter less to compile


def shaken(params: dict, seed: int, scale: float = 0.1) -> dict:
    """Adds noise to every parameter, so that no branch starts at zero."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + scale * rng.standard_normal(x.shape, np.float32), jax.device_get(params))


@pytest.fixture(scope="session")
def tiny() -> ModelConfig:
    return TINY


@pytest.fixture(scope="session")
def tiny_params() -> dict:
    """Parameters of `OpenDet(TINY)`, none of them zero."""
    return shaken(init_params(OpenDet(TINY), jax.random.key(0)), 1)


@pytest.fixture(scope="session")
def tiny_images() -> Images:
    """Two photographs padded to 64 × 96; the second is 48 × 64."""
    mask = np.ones((2, 64, 96), bool)
    mask[1, 48:], mask[1, :, 64:] = False, False
    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 96, 3), dtype=np.uint8)
    return Images(pixels=pixels, mask=mask)


@pytest.fixture(scope="session")
def tiny_objects() -> Objects:
    """Two and three objects in four slots."""
    rng = np.random.default_rng(1)
    valid = np.arange(4) < np.array([[2], [3]])
    boxes = np.concatenate([rng.uniform(0.3, 0.7, (2, 4, 2)), rng.uniform(0.1, 0.4, (2, 4, 2))], axis=-1)
    texts = rng.normal(size=(2, 4, 32))
    texts /= np.linalg.norm(texts, axis=-1, keepdims=True)
    tokens = np.where(valid[..., None], np.array([5, 9, 1, 0]), 0).astype(np.int32)
    return Objects(boxes=boxes.astype(np.float32), valid=valid, texts=texts.astype(np.float32), tokens=tokens)


@pytest.fixture(scope="session")
def tiny_pyramids() -> tuple[Features, Memory]:
    """B_feat and E_feat of two images on levels of 6 × 8 … 1 × 1 cells; the second image fills 4 × 4 of the first."""
    shapes = ((6, 8), (3, 4), (2, 2), (1, 1))
    covered = ((4, 4), (2, 2), (2, 1), (1, 1))
    valid = np.concatenate(
        [
            np.stack([np.ones((h, w), bool), (np.arange(h)[:, None] < rows) & (np.arange(w) < columns)]).reshape(2, -1)
            for (h, w), (rows, columns) in zip(shapes, covered, strict=True)
        ],
        axis=1,
    )
    ratios = np.ones((2, 4, 2), np.float32)
    ratios[1] = [(columns / w, rows / h) for (h, w), (rows, columns) in zip(shapes, covered, strict=True)]
    tokens = jax.random.normal(jax.random.key(2), (2, 2, valid.shape[1], 32))
    valid, ratios = jnp.asarray(valid), jnp.asarray(ratios)
    features = Features(tokens=tokens[0], valid=valid, valid_ratios=ratios, level_shapes=shapes, positions=tokens[1])
    return features, Memory(tokens[1], valid, ratios, shapes)
