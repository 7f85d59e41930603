"""Open-Det with Swin-S; the paper reports fixed AP 32.8 on frequent, 26.0 on rare classes, 30.4 in all.

Command: that of configs/swin_t.py with this file.
"""

from ml_collections import ConfigDict

from configs import swin_t


def get_config() -> ConfigDict:
    config = swin_t.get_config()
    config.name = "swin_s"
    config.model.backbone.depths = (2, 2, 18, 2)
    return config
