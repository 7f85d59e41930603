"""The embedded default: drawn scenes, a small model, trained from nothing on two CPU cores in minutes.

    python -m opendet_jax.main --config=configs/scenes_tiny.py --workdir=runs/scenes_tiny --mode=train

The names are spelled byte by byte (ByT5's vocabulary), the text embeddings are hashed character n-grams: a stand-in
that knows spelling, not meaning. Neither needs a download.
"""

from ml_collections import ConfigDict

from opendet_jax.config import Config


def get_config() -> ConfigDict:
    config = Config().to_config_dict()
    config.name = "scenes_tiny"

    model = config.model
    model.backbone.update(embed_dim=32, depths=(1, 1, 2, 1), num_heads=(2, 4, 8, 16), window_size=4, drop_path_rate=0.0)
    model.t5.update(vocab_size=384, num_layers=1, num_heads=4, head_width=32, ffn_width=256, dropout=0.0)
    model.width = 128
    model.text_width = 128
    model.num_heads = 4
    model.num_points = 2
    model.ffn_width = 256
    model.encoder_layers = 2
    model.one_to_many_layers = 2
    model.one_to_one_layers = 2
    model.max_queries = 32
    model.min_queries = 16
    model.denoising_queries = 32
    model.distiller_points = 4
    model.distiller_blocks = 1
    model.distiller_hidden = 256
    model.distiller_dropout = 0.0
    model.prompt_dropout = 0.1
    # A small T5 that starts from nothing takes the length of its input seriously: show it what training showed it.
    model.normalise_prompts_at_inference = True

    data = config.data
    data.name = "scenes"
    data.source = "scenes"
    data.tokenizer = "byt5"
    data.max_name_tokens = 24
    data.max_objects = 8
    data.batch_size = 8
    data.buckets = ((128, 128),)
    data.train_short_sides = (112, 128)
    data.eval_short_side = 128
    data.max_long_side = 128
    data.crop_probability = 0.0

    optimizer = config.optimizer
    optimizer.detector_rate = 1e-3
    optimizer.backbone_rate = 1e-3
    optimizer.generator_rate = 1e-3
    optimizer.warmup_steps = 50
    optimizer.freeze_head_steps = 0  # the language model starts from nothing
    optimizer.freeze_embedding_steps = 0
    optimizer.decay_steps = (1450, 1750)

    config.train.steps = 1900
    config.train.checkpoint_every = 500
    config.eval.batch_size = 16
    config.eval.max_detections = 20
    config.eval.max_new_tokens = 24
    return config
