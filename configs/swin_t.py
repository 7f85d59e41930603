"""Open-Det with Swin-T, the paper's main model: 31 epochs of Visual Genome, zero-shot on LVIS minival.

The paper reports fixed AP 27.0 (APr 21.0, APc 24.8, APf 30.1), trained on four V100 with two images each.

    python -m opendet_jax.main --config=configs/swin_t.py --workdir=runs/swin_t --mode=train \
        --config.data.train.annotations=train_from_objects.json --config.data.train.images=VG_100K \
        --config.data.eval.annotations=lvis_v1_minival.json --config.data.eval.images=coco \
        --config.data.text_table=vg_names.npy
"""

from ml_collections import ConfigDict

from opendet_jax.config import Config


def get_config() -> ConfigDict:
    config = Config().to_config_dict()
    config.data.text_embeddings = "table"
    config.data.text_table = "text_embeddings.npy"
    return config
