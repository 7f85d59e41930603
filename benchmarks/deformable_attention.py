"""Deformable attention against the same in PyTorch: `grid_sample` for each level, then a weighted sum.

    python -m benchmarks.deformable_attention

The tokens are those of a 480 × 640 photograph; in the encoder every token is a query.
"""

from functools import partial

import numpy as np

from benchmarks.comparison import Case, Ours, Run, main
from benchmarks.sizes import LEVELS, compiled

# What is computed → which inputs (value, locations, weights) get a gradient. Locations and weights alone do without
# scatter-additions into the value's gradient: the difference is what those cost.
PARTS = {"forward": (), "forward and backward": (0, 1, 2), "forward and backward without the value's gradient": (1, 2)}
HEADS, WIDTH, POINTS = 8, 32, 4


def example(queries: int):
    """Value, locations, weights and cotangent, float32. Points lie a few cells around each query's own place, as in a
    trained model: every cell in turn where all tokens are queries, anywhere in the image otherwise."""
    rng = np.random.default_rng(0)
    tokens = sum(h * w for h, w in LEVELS)
    centres = [np.stack(np.meshgrid((np.arange(w) + 0.5) / w, (np.arange(h) + 0.5) / h), -1) for h, w in LEVELS]
    centres = np.concatenate([level.reshape(-1, 2) for level in centres])
    places = centres if queries == tokens else rng.uniform(size=(queries, 2))
    cells = np.array([(w, h) for h, w in LEVELS])[:, None]
    offsets = rng.normal(scale=3.0, size=(1, queries, HEADS, len(LEVELS), POINTS, 2)) / cells
    weights = rng.uniform(size=(1, queries, HEADS, len(LEVELS), POINTS))
    arrays = (
        rng.normal(size=(1, tokens, HEADS, WIDTH)),
        places[None, :, None, None, None] + offsets,
        weights / weights.sum((-1, -2), keepdims=True),
        rng.normal(size=(1, queries, HEADS * WIDTH)),
    )
    return tuple(x.astype(np.float32) for x in arrays)


def ours(queries: int, part: str) -> Ours:
    import jax

    from opendet_jax.ops.deformable_attention import deformable_attention

    differentiated = PARTS[part]

    def run(value, locations, weights, cotangent):
        inputs = [value, locations, weights]

        def forward(*some):
            for i, array in zip(differentiated, some, strict=True):
                inputs[i] = array
            return deformable_attention(inputs[0], LEVELS, *inputs[1:])

        out, pull = jax.vjp(forward, *(inputs[i] for i in differentiated))
        return out, *pull(cotangent)

    return Ours(*compiled(run, *example(queries)))


def peer(queries: int, part: str) -> Run:
    import torch

    *inputs, cotangent = map(torch.from_numpy, example(queries))
    wanted = [inputs[i].requires_grad_() for i in PARTS[part]]

    def run():
        out = torch_deformable_attention(*inputs)
        gradients = torch.autograd.grad(out, wanted, cotangent) if wanted else ()
        return [x.detach().numpy() for x in (out, *gradients)]

    return run


def torch_deformable_attention(value, locations, weights):
    """[B, S, H, d], [B, Q, H, L, P, 2], [B, Q, H, L, P] → [B, Q, H·d]."""
    import torch
    from torch.nn import functional

    batch, _, heads, width = value.shape
    queries, points = locations.shape[1], locations.shape[4]
    sample = partial(functional.grid_sample, mode="bilinear", padding_mode="zeros", align_corners=False)
    levels, grids = value.split([h * w for h, w in LEVELS], dim=1), 2 * locations - 1
    read = [
        sample(
            level.permute(0, 2, 3, 1).reshape(batch * heads, width, h, w),
            grids[:, :, :, i].transpose(1, 2).reshape(batch * heads, queries, points, 2),
        )
        for i, ((h, w), level) in enumerate(zip(LEVELS, levels, strict=True))
    ]  # each [B·H, d, Q, P]
    weights = weights.transpose(1, 2).reshape(batch * heads, 1, queries, -1)
    out = (torch.cat(read, -1) * weights).sum(-1)
    return out.reshape(batch, heads * width, queries).transpose(1, 2)


def equal(mine, theirs) -> None:
    for ours, peers in zip(mine, theirs, strict=True):
        np.testing.assert_allclose(ours, peers, atol=2e-5 * np.abs(peers).max())


WANTED = {(6380, "forward"): 4.0, (6380, "forward and backward"): 2.0}
CASES = [
    Case(
        f"deformable attention, {queries} queries, {part}",
        *(partial(side, queries, part) for side in (ours, peer)),
        equal,
        WANTED.get((queries, part)),
        repeats=7,
    )
    for queries in (6380, 900)
    for part in PARTS
]

if __name__ == "__main__":
    main(__doc__, "benchmarks.deformable_attention", CASES)
