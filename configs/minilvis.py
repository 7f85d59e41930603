"""Real photographs: 256 COCO images with LVIS names to train on, 180 to evaluate, a small Swin at 320 pixels.

The folder that the environment variable OPENDET_DATA names holds them (docs/data.md). To see the model fit 32 of them
(trained without augmentation, evaluated on the same 32):

    python -m opendet_jax.main --config=configs/minilvis.py:overfit --workdir=runs/minilvis_overfit --mode=train

All 256, and the honest score on photographs it has not seen: leave out ":overfit". docs/results.md has what both reach.
Text embeddings are CLIP ViT-B/32's, 512 wide, so the language model is a T5 of width 512, trained from nothing.
"""

import os
from pathlib import Path

from ml_collections import ConfigDict

from opendet_jax.config import Config, ConfigError

OVERFIT = 32  # photographs


def get_config(variant: str = "") -> ConfigDict:
    """`variant`: "overfit", or nothing."""
    if variant not in ("", "overfit"):
        raise ConfigError(f"configs/minilvis.py:{variant} does not exist; there is configs/minilvis.py:overfit")
    folder = Path(os.environ.get("OPENDET_DATA", "data"))
    config = Config().to_config_dict()
    config.name = "minilvis"

    model = config.model
    model.backbone.update(embed_dim=32, depths=(2, 2, 2, 2), num_heads=(2, 4, 8, 16), window_size=5, drop_path_rate=0.0)
    model.t5.update(num_layers=1, num_heads=8, ffn_width=512, dropout=0.0)
    model.width = 128
    model.text_width = 512
    model.num_heads = 4
    model.num_points = 2
    model.ffn_width = 256
    model.encoder_layers = 2
    model.one_to_many_layers = 2
    model.one_to_one_layers = 2
    model.max_queries = 100
    model.min_queries = 50
    model.denoising_queries = 80
    model.distiller_points = 4
    model.distiller_blocks = 1
    model.distiller_hidden = 256
    model.distiller_dropout = 0.0
    model.prompt_dropout = 0.1
    # As in configs/scenes_tiny.py: this T5 starts from nothing.
    model.normalise_prompts_at_inference = True

    data = config.data
    data.name = "minilvis"
    data.train.annotations = str(folder / "minilvis/train.json")
    data.train.images = str(folder / "minilvis/images")
    data.eval.annotations = str(folder / "minilvis/val.json")
    data.eval.images = str(folder / "minilvis/images")
    data.text_embeddings = "table"
    data.text_table = str(folder / "names/clip_vitb32_union_names.npy")
    data.tokenizer = str(folder / "tokenizers/t5")
    data.max_name_tokens = 8
    data.max_objects = 48
    data.batch_size = 4
    data.buckets = ((256, 320), (320, 256), (320, 320))
    data.train_short_sides = (192, 224, 256)
    data.eval_short_side = 256
    data.max_long_side = 320
    data.crop_short_sides = (256, 288, 320)
    data.crop_range = (192, 320)

    optimizer = config.optimizer
    optimizer.detector_rate = 7e-4
    optimizer.backbone_rate = 7e-4
    optimizer.generator_rate = 7e-4
    optimizer.warmup_steps = 50
    optimizer.freeze_head_steps = 0  # the language model starts from nothing
    optimizer.freeze_embedding_steps = 0
    optimizer.decay_steps = (1200, 1420)

    config.train.steps = 1500
    config.train.checkpoint_every = 500
    config.eval.batch_size = 4
    config.eval.max_detections = 100
    config.eval.max_new_tokens = 8
    if variant == "overfit":
        data.train_limit = config.eval.limit = OVERFIT
        data.eval.update(annotations=data.train.annotations, images=data.train.images)
        data.flip_probability = data.crop_probability = 0.0
        data.train_short_sides = (data.eval_short_side,)
    return config
