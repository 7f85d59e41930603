"""What the benchmarks share: one 480 × 640 photograph, Swin-T, a peer's weights as ours, compilation with its time."""

import time
from collections.abc import Callable
from tempfile import TemporaryDirectory
from typing import Any

HEIGHT, WIDTH = 480, 640
LEVELS = ((60, 80), (30, 40), (15, 20), (8, 10))
SWIN_T = {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24], "window_size": 7}


def compiled(function: Callable, *arguments: Any) -> tuple[Callable[[], Any], float]:
    """The function jitted for these arguments, run and waited for by the result; and the seconds of its compilation."""
    import jax

    arguments = jax.device_put(arguments)
    start = time.perf_counter()
    program = jax.jit(function).lower(*arguments).compile()
    spent = time.perf_counter() - start
    return lambda: jax.block_until_ready(program(*arguments)), spent


def peer_swin(seed: int = 0):
    import torch
    from transformers import SwinBackbone, SwinConfig

    torch.manual_seed(seed)
    return SwinBackbone(SwinConfig(**SWIN_T, drop_path_rate=0.0, out_features=["stage2", "stage3", "stage4"]))


def converted(kind: str, model) -> dict[str, Any]:
    """A peer's weights as ours, by way of the file that it saves and the converter that people use."""
    from opendet_jax.weights.convert import convert
    from opendet_jax.weights.source import read_source

    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return dict(convert(kind, read_source(folder)).converted.params)


def detr_config(queries: int, layers_with_losses: bool):
    """transformers' two-stage Deformable DETR with box refinement at the paper's sizes."""
    from transformers import DeformableDetrConfig, SwinConfig

    backbone = SwinConfig(**SWIN_T, drop_path_rate=0.0, out_features=["stage2", "stage3", "stage4"])
    return DeformableDetrConfig(
        backbone_config=backbone,
        num_labels=1,
        num_queries=queries,
        two_stage=True,
        two_stage_num_proposals=queries,
        with_box_refine=True,
        encoder_ffn_dim=2048,
        decoder_ffn_dim=2048,
        dropout=0.0,
        auxiliary_loss=layers_with_losses,
        disable_custom_kernels=True,
    )
