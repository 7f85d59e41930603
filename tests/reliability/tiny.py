"""The smallest whole program: drawn scenes of 32 pixels and a model that compiles in seconds."""

from ml_collections import ConfigDict

from configs import scenes_tiny


def get_config() -> ConfigDict:
    config = scenes_tiny.get_config()
    config.name = "tiny"
    model = config.model
    model.backbone.update(embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), window_size=2)
    model.t5.update(num_layers=1, num_heads=2, head_width=8, ffn_width=16, lora_rank=2)
    model.update(width=32, text_width=16, num_heads=2, num_points=1, ffn_width=16)
    model.update(encoder_layers=1, one_to_many_layers=1, one_to_one_layers=1)
    model.update(max_queries=6, min_queries=4, denoising_queries=4, denoising_labels=4)
    model.update(distiller_points=1, distiller_blocks=1, distiller_hidden=16)
    data = config.data
    data.update(scenes_train=12, scenes_eval=2, scenes_size=32, max_name_tokens=4, max_objects=3, batch_size=2)
    data.max_unwritable = 1.0  # names of four letters
    data.update(buckets=((32, 32),), train_short_sides=(32,), eval_short_side=32, max_long_side=32)
    config.optimizer.warmup_steps = 0
    config.optimizer.decay_steps = (1000,)
    config.train.update(steps=6, log_every=1, checkpoint_every=2)
    config.eval.update(batch_size=2, max_detections=4, max_new_tokens=2, num_beams=2, pictures=1)
    return config
