"""Open-Det with Swin-L, pre-trained at 384 on ImageNet-22k; the paper reports fixed AP 33.1 (APr 31.2).

Command: that of configs/swin_t.py with this file.
"""

from ml_collections import ConfigDict

from configs import swin_t


def get_config() -> ConfigDict:
    config = swin_t.get_config()
    config.name = "swin_l"
    config.model.backbone.embed_dim = 192
    config.model.backbone.depths = (2, 2, 18, 2)
    config.model.backbone.num_heads = (6, 12, 24, 48)
    config.model.backbone.window_size = 12
    return config
