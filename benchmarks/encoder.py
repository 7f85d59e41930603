"""Six encoder layers over the tokens of a 480 × 640 photograph against transformers' DeformableDetrEncoder.

python -m benchmarks.encoder
"""

from functools import partial

import numpy as np

from benchmarks.comparison import Case, Ours, Run, main
from benchmarks.multiply_adds import products
from benchmarks.sizes import LEVELS, compiled, detr_config

TOKENS, D = sum(h * w for h, w in LEVELS), 256


def arrays() -> tuple[np.ndarray, np.ndarray]:
    """Tokens and their positions."""
    tokens, positions = np.random.default_rng(0).standard_normal((2, 1, TOKENS, D), np.float32)
    return tokens, positions


def ours(backward: bool) -> Ours:
    import jax
    import jax.numpy as jnp

    from opendet_jax.config import ModelConfig
    from opendet_jax.model.encoder import Encoder
    from opendet_jax.model.neck import Features

    tokens, positions = map(jnp.asarray, arrays())
    valid, ratios = jnp.ones((1, TOKENS), bool), jnp.ones((1, len(LEVELS), 2))
    features = Features(tokens=tokens, valid=valid, valid_ratios=ratios, level_shapes=LEVELS, positions=positions)
    model = Encoder(ModelConfig())
    params = jax.jit(model.init)(jax.random.key(0), features)["params"]

    def forward(params, features):
        return model.apply({"params": params}, features).tokens

    function = jax.grad(lambda params, features: forward(params, features).sum()) if backward else forward
    run, seconds = compiled(function, params, features)
    return Ours(run, seconds, products(function, params, features))


def peer(backward: bool) -> Run:
    import torch
    from transformers.models.deformable_detr.modeling_deformable_detr import DeformableDetrEncoder

    torch.manual_seed(0)
    model = DeformableDetrEncoder(detr_config(900, False)).eval()
    tokens, positions = map(torch.from_numpy, arrays())
    shapes = torch.tensor(LEVELS)
    starts = torch.cat([shapes.new_zeros(1), shapes.prod(1).cumsum(0)[:-1]])

    def run():
        with torch.set_grad_enabled(backward):
            out = model(
                inputs_embeds=tokens,
                attention_mask=torch.ones(1, TOKENS, dtype=torch.bool),
                spatial_position_embeddings=positions,
                spatial_shapes=shapes,
                spatial_shapes_list=list(LEVELS),
                level_start_index=starts,
                valid_ratios=torch.ones(1, len(LEVELS), 2),
            ).last_hidden_state
        if backward:
            model.zero_grad()
            out.sum().backward()

    return run


CASES = (
    Case("encoder, 6,380 tokens, forward", partial(ours, False), partial(peer, False)),
    Case("encoder, 6,380 tokens, forward and backward", partial(ours, True), partial(peer, True)),
)

if __name__ == "__main__":
    main(__doc__, "benchmarks.encoder", CASES)
