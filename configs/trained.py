"""What a model was trained with, and so what evaluates it and predicts with it.

    python -m opendet_jax.main --config=configs/trained.py:DIR --workdir=DIR --mode=eval

DIR is a run's workdir, another folder that holds a whole model, one on the Hugging Face hub (hf://user/model), or the
name of a model that comes with the package.
--mode=eval and --mode=predict without any --config mean this one, with their workdir as DIR.
"""

from dataclasses import asdict

from ml_collections import ConfigDict

from opendet_jax.checkpoints.folder import CHECKPOINTS, holds_model, read_config
from opendet_jax.checkpoints.restore import find_model
from opendet_jax.checkpoints.same_config import CheckpointError, as_written
from opendet_jax.config import ConfigError, MeshConfig
from opendet_jax.config_files import parse_config


def get_config(folder: str = "") -> ConfigDict:
    """`folder`: that of the model."""
    if not folder:
        raise ConfigError("configs/trained.py:DIR needs the folder of a model")
    model = find_model(folder)
    if not holds_model(model):
        raise CheckpointError(f"no checkpoint in {model / CHECKPOINTS}")
    config = parse_config(as_written(read_config(model, "opendet"))).to_config_dict()
    config.mesh.update(asdict(MeshConfig()))  # of the machine that trained
    return config
