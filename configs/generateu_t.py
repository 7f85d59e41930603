"""GenerateU with Swin-T, the baseline of the Open-Det paper, by switches of this program. docs/generateu.md explains.

*Generative Region-Language Pretraining for Open-Ended Object Detection* (CVPR 2024, arXiv 2403.10191).
Sizes, data and schedule are those of configs/swin_t.py, as in the paper's table 3: only the method differs.

    opendet train generateu_t                as opendet train swin_t, with the same data flags
    opendet train generateu_t:published      with GenerateU's own schedule: 149 epochs of Visual Genome, batches of 64
    opendet train generateu_t:scenes         three steps on drawn scenes: does it all run here?
"""

from ml_collections import ConfigDict

from configs import swin_t
from opendet_jax.config import ConfigError

QUERIES = 300


def get_config(variant: str = "") -> ConfigDict:
    """`variant`: "published", "scenes", or nothing."""
    if variant not in ("", "published", "scenes"):
        raise ConfigError(f"configs/generateu_t.py:{variant} does not exist; there are :published and :scenes")
    config = swin_t.get_config(variant if variant == "scenes" else "")
    config.name = f"generateu_t_{variant}" if variant else "generateu_t"
    if variant == "published":
        _schedule(config)
    return as_generateu(config, QUERIES)


def as_generateu(config: ConfigDict, queries: int) -> ConfigDict:
    """The same config with all that Open-Det adds to GenerateU switched off, and `queries` queries an image."""
    config.ablation.update(object_detector=False, aligner=False, l_to_v=False, distiller=False)
    config.ablation.update(lora_head=False, text_denoising=False, masked_alignment=False, joint_loss=False)
    config.model.update(max_queries=queries, min_queries=queries, denoising_queries=0)
    # In training prompts are normalised here. GenerateU's enter T5 at inference as they did in training.
    config.model.normalise_prompts_at_inference = True
    return config


def _schedule(config: ConfigDict) -> None:
    """That of GenerateU's program for Swin-T on Visual Genome."""
    config.data.batch_size = 64
    config.model.backbone.drop_path_rate = 0.3
    config.optimizer.update(detector_rate=2e-4, backbone_rate=2e-5, generator_rate=3e-4, decay_steps=(160_000,))
    config.train.steps = 180_000
