"""GenerateU at the size of configs/scenes_tiny.py: the baseline beside the embedded default, trained in minutes.

    opendet train generateu_tiny

Scenes, sizes and schedule are those of scenes_tiny, so that the two can be compared. configs/generateu_t.py has what is
switched off, docs/generateu.md what that means.
"""

from ml_collections import ConfigDict

from configs import scenes_tiny
from configs.generateu_t import as_generateu


def get_config() -> ConfigDict:
    config = scenes_tiny.get_config()
    config.name = "generateu_tiny"
    return as_generateu(config, queries=config.model.max_queries)
