"""Masks, valid ratios, positions and the fourth level."""

import jax
import jax.numpy as jnp
import numpy as np
import torch

from opendet_jax.model.neck import Neck, nearest, sine_embedding, valid_ratios


def photograph(height, width, sizes):
    """True on the upper left h × w of each image."""
    mask = np.zeros((len(sizes), height, width), bool)
    for i, (h, w) in enumerate(sizes):
        mask[i, :h, :w] = True
    return jnp.asarray(mask)


def test_masks_are_downsampled_as_pytorch_does():
    for height in (96, 160, 480, 800, 1088, 1344):
        mask = photograph(height, 64, [(height * 3 // 5 + 7, 41)])
        for stride in (8, 16, 32, 64):
            shape = (-(-height // stride), -(-64 // stride))
            want = torch.nn.functional.interpolate(torch.tensor(np.asarray(mask)).float()[None], size=shape)[0]
            np.testing.assert_array_equal(nearest(mask, *shape), want.bool().numpy())


def test_valid_ratios_are_width_then_height():
    np.testing.assert_allclose(valid_ratios(photograph(4, 8, [(1, 6), (4, 8)])), [[0.75, 0.25], [1, 1]])


def test_positions_do_not_depend_on_padding():
    alone = sine_embedding(photograph(6, 7, [(6, 7)]), 32)
    padded = sine_embedding(photograph(9, 12, [(6, 7)]), 32)
    np.testing.assert_allclose(padded[:, :6, :7], alone, atol=1e-6)
    assert np.all(np.isfinite(padded))


def test_levels_of_a_small_model():
    rng = jax.random.key(0)
    maps = [jax.random.normal(rng, (2, 64 // s, 96 // s, 4 * s)) for s in (8, 16, 32)]
    mask = photograph(64, 96, [(64, 96), (40, 50)])
    features, params = Neck(32).init_with_output(rng, maps, mask)
    assert features.level_shapes == ((8, 12), (4, 6), (2, 3), (1, 2))
    assert features.tokens.shape == features.positions.shape == (2, 96 + 24 + 6 + 2, 32)
    assert params["params"]["level_embed"].shape == (4, 32)
    np.testing.assert_array_equal(features.valid[0], True)
    assert features.valid[1, :96].sum() == 5 * 7  # cell i of stride 8 reads pixel 8·i, as nearest does

    half = Neck(32, jnp.bfloat16).apply(params, maps, mask)
    assert half.tokens.dtype == jnp.bfloat16
    assert half.positions.dtype == jnp.float32
    np.testing.assert_allclose(half.tokens.astype(jnp.float32), features.tokens, atol=0.1)
