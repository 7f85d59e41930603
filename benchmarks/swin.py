"""Swin-T on one 480 × 640 photograph against transformers' SwinBackbone with the same weights.

python -m benchmarks.swin
python -m benchmarks.swin --case 'Swin-T 480×640, forward' --repeats 11
"""

from functools import partial

import numpy as np

from benchmarks.comparison import Case, Ours, Run, main
from benchmarks.multiply_adds import products
from benchmarks.sizes import HEIGHT, SWIN_T, WIDTH, compiled, converted, peer_swin


def pixels() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((1, HEIGHT, WIDTH, 3), np.float32)


def ours(backward: bool) -> Ours:
    import jax
    import jax.numpy as jnp

    from opendet_jax.config import SwinConfig
    from opendet_jax.model.swin import Swin

    sizes = {key: tuple(x) if isinstance(x, list) else x for key, x in SWIN_T.items()}
    model, params = Swin(SwinConfig(**sizes, drop_path_rate=0.0)), converted("swin", peer_swin())

    def forward(params, x):
        return model.apply({"params": params}, x, True)

    def loss(params, x):
        return sum(jnp.sum(feature) for feature in forward(params, x))

    function = jax.grad(loss) if backward else forward
    run, seconds = compiled(function, params, pixels())
    return Ours(run, seconds, products(function, params, pixels()))


def peer(backward: bool) -> Run:
    import torch

    model, x = peer_swin().eval(), torch.from_numpy(pixels().transpose(0, 3, 1, 2).copy())

    def run():
        with torch.set_grad_enabled(backward):
            maps = model(x).feature_maps
        if backward:
            model.zero_grad()
            sum(feature.sum() for feature in maps).backward()
        return maps

    return run


def same_maps(mine, theirs) -> None:
    for ours, feature in zip(mine, theirs, strict=True):
        np.testing.assert_allclose(ours, feature.numpy().transpose(0, 2, 3, 1), atol=2e-4)


CASES = (
    Case("Swin-T 480×640, forward", partial(ours, False), partial(peer, False), same_maps, 1.0, repeats=9),
    Case("Swin-T 480×640, forward and backward", partial(ours, True), partial(peer, True), least=0.85),
)

if __name__ == "__main__":
    main(__doc__, "benchmarks.swin", CASES)
