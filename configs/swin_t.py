"""Open-Det with Swin-T, the paper's main model: 31 epochs of Visual Genome, zero-shot on LVIS minival.

The paper reports fixed AP 27.0 (APr 21.0, APc 24.8, APf 30.1), trained on four V100 with two images each.

    python -m opendet_jax.main --config=configs/swin_t.py --workdir=runs/swin_t --mode=train \
        --config.data.train.annotations=train_from_objects.json --config.data.train.images=VG_100K \
        --config.data.eval.annotations=lvis_v1_minival.json --config.data.eval.images=coco \
        --config.data.text_table=vg_names.npy

docs/data.md has the commands that get the data. Without any, the same model on drawn scenes, to see that all of it runs
on this machine (three steps, one image each; minutes, and 16 GiB of memory):

    python -m opendet_jax.main --config=configs/swin_t.py:scenes
"""

from ml_collections import ConfigDict

from opendet_jax.config import Config, ConfigError


def get_config(data: str = "") -> ConfigDict:
    """`data`: "scenes", or nothing."""
    if data not in ("", "scenes"):
        raise ConfigError(f"configs/swin_t.py:{data} does not exist; there is configs/swin_t.py:scenes")
    config = Config().to_config_dict()
    if data:
        return _on_scenes(config)
    config.data.text_embeddings = "table"
    config.data.text_table = "text_embeddings.npy"
    return config


def _on_scenes(config: ConfigDict) -> ConfigDict:
    config.name = "swin_t_scenes"
    data = config.data
    data.update(name="scenes", source="scenes", scenes_train=16, scenes_eval=4, scenes_size=480, tokenizer="byt5")
    data.update(batch_size=1, buckets=((480, 480),), train_short_sides=(480,), eval_short_side=480, max_long_side=480)
    data.crop_probability = 0.0
    config.train.update(steps=3, log_every=1)
    config.eval.update(batch_size=1, pictures=4)
    return config
