"""Boxes and scores of 900 queries in one 480 × 640 photograph against transformers' two-stage DeformableDetr, Swin-T.

Equal sizes: six encoder and six decoder layers, four levels, width 256. The decoders differ as the methods do: ours has
four layers without self-attention and two with two rounds of it, the peer's six have one round each.

    python -m benchmarks.detection
"""

import numpy as np

from benchmarks.comparison import Case, Ours, Run, main
from benchmarks.multiply_adds import products
from benchmarks.sizes import HEIGHT, WIDTH, compiled, detr_config

QUERIES = 900


def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (1, HEIGHT, WIDTH, 3), dtype=np.uint8)


def ours() -> Ours:
    import jax

    from opendet_jax.batch import Images
    from opendet_jax.config import ModelConfig, T5Config
    from opendet_jax.model.opendet import OpenDet, init_params

    # The language model takes no part and is made small.
    t5 = T5Config(vocab_size=32, num_layers=1, num_heads=1, ffn_width=8)
    model = OpenDet(ModelConfig(max_queries=QUERIES, min_queries=QUERIES, score_threshold=1e-6, t5=t5))
    params = init_params(model, jax.random.key(0))
    images = Images(pixels(), np.ones((1, HEIGHT, WIDTH), bool))

    def detect(params, images):
        detected = model.apply({"params": params}, images, method="detect")
        return detected.decoded.boxes[-1], detected.decoded.objectness[-1]  # the compiler leaves the prompts out

    run, seconds = compiled(detect, params, images)
    return Ours(run, seconds, products(detect, params, images))


def peer() -> Run:
    import torch
    from transformers import DeformableDetrForObjectDetection

    torch.manual_seed(0)
    model = DeformableDetrForObjectDetection(detr_config(QUERIES, False)).eval()
    x = torch.from_numpy(pixels().transpose(0, 3, 1, 2).astype(np.float32) / 255)

    def run():
        with torch.no_grad():
            return model(x)

    return run


CASES = (Case("detection 480×640, 900 queries", ours, peer, least=1.5, repeats=7),)

if __name__ == "__main__":
    main(__doc__, "benchmarks.detection", CASES)
