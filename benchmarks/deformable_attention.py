"""Deformable attention on CPU against the same in PyTorch, both timed in turn in one process. Prints a table.

    python -m benchmarks.deformable_attention
    python -m benchmarks.deformable_attention --queries 900 --threads 1 --repeats 11

The peer is the usual form without a kernel of its own: `grid_sample` for each level, then a weighted sum.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from functools import partial

# What is computed → which inputs (value, locations, weights) get a gradient. Locations and weights alone do without
# scatter-additions into the value's gradient: the difference is what those cost.
PARTS = {"forward": (), "forward and backward": (0, 1, 2), "the same without the value's gradient": (1, 2)}
LEVELS = ((60, 80), (30, 40), (15, 20), (8, 10))  # of a 480×640 image: 6380 tokens
HEADS, WIDTH, POINTS = 8, 32, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, nargs="+", default=[6380, 900], help="6380: every token is a query")
    parser.add_argument("--threads", type=int, default=2, help="cores given to both (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=7, help="timed rounds of each (default: %(default)s)")
    arguments = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])  # before XLA counts its cores

    print("| queries | | PyTorch, ms | ours, ms | ratio (min–max) | compile, s | difference |")
    print("|---|---|---|---|---|---|---|")
    for queries in arguments.queries:
        for part in PARTS:
            compare(queries, part, arguments.threads, arguments.repeats)


def compare(queries: int, part: str, threads: int, repeats: int) -> None:
    """One row of the table; milliseconds are medians, ratios are of one round each."""
    arrays = example(queries)
    ours, compile_seconds = jax_program(arrays, PARTS[part])
    peer = torch_program(arrays, PARTS[part], threads)
    difference = max(abs(a - b).max() / abs(b).max() for a, b in zip(ours(), peer(), strict=True))
    rounds = [(seconds(peer), seconds(ours)) for _ in range(repeats)]
    ratios = [a / b for a, b in rounds]
    theirs, mine = (statistics.median(column) * 1e3 for column in zip(*rounds, strict=True))
    spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"
    print(f"| {queries} | {part} | {theirs:.0f} | {mine:.0f} | {spread} | {compile_seconds:.1f} | {difference:.0e} |")


def seconds(function: Callable) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def example(queries: int):
    """Value, locations, weights and cotangent, float32. Points lie a few cells around each query's own place, as in a
    trained model: every cell in turn where all tokens are queries, anywhere in the image otherwise."""
    import numpy as np

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


def jax_program(arrays, differentiated: tuple[int, ...]):
    """A function without arguments that runs and waits, and the seconds its compilation took."""
    import jax
    import numpy as np

    from opendet_jax.ops.deformable_attention import deformable_attention

    def run(value, locations, weights, cotangent):
        inputs = [value, locations, weights]

        def forward(*some):
            for i, array in zip(differentiated, some, strict=True):
                inputs[i] = array
            return deformable_attention(inputs[0], LEVELS, *inputs[1:])

        out, pull = jax.vjp(forward, *(inputs[i] for i in differentiated))
        return out, *pull(cotangent)

    arrays = jax.device_put(arrays)
    start = time.perf_counter()
    program = jax.jit(run).lower(*arrays).compile()
    compile_seconds = time.perf_counter() - start
    return lambda: [np.asarray(x) for x in jax.block_until_ready(program(*arrays))], compile_seconds


def torch_program(arrays, differentiated: tuple[int, ...], threads: int):
    import torch

    torch.set_num_threads(threads)
    *inputs, cotangent = (torch.from_numpy(x) for x in arrays)
    wanted = [inputs[i].requires_grad_() for i in differentiated]

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


if __name__ == "__main__":
    main()
