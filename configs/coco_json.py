"""Your own photographs: train on any json in COCO form, from a checkpoint or from nothing. docs/finetune.md explains.
A YOLO or Pascal VOC folder is named as annotations alone (docs/data.md).

From a checkpoint, which is a run's workdir, a folder of converted weights (docs/weights.md) or a model on the Hugging
Face hub (hf://user/model, best with @revision); the model, the
tokenizer, the text embeddings and the picture sizes are those it was trained with:

    python -m opendet_jax.main --config=configs/coco_json.py:DIR --workdir=runs/mine --mode=train \
        --config.data.train.annotations=mine.json --config.data.train.images=photos

From nothing, a small model for a laptop (minilvis's at 320 pixels; names spelled byte by byte, hashed text embeddings,
so that nothing need be downloaded): leave out ":DIR".

A name is that of its box's category, or of the annotation's field that `--config.data.train.name_field` names.
Evaluated on `--config.data.eval.annotations` and `.images`, or, where they are not given, on a tenth of the images,
which is then not trained on.
"""

from dataclasses import asdict

from ml_collections import ConfigDict

from configs import minilvis
from opendet_jax.checkpoints import hub
from opendet_jax.checkpoints.folder import read_config
from opendet_jax.checkpoints.restore import find_model
from opendet_jax.config import DataConfig, DatasetPaths, InitConfig, MeshConfig, PredictConfig, TrainConfig
from opendet_jax.config_files import parse_config

STEPS = 1000


def get_config(checkpoint: str = "") -> ConfigDict:
    """`checkpoint`: a folder to start from, or a model on the hub, or nothing."""
    config = _of_checkpoint(checkpoint) if checkpoint else _small()
    config.name = "coco_json"
    defaults, data = DataConfig(), config.data
    data.name = "coco_json"
    data.source = "json"
    data.mixture = ()
    data.train_limit = 0
    data.held_out = defaults.held_out
    for paths in (data.train, data.eval):
        paths.update(asdict(DatasetPaths()))
    config.mesh.update(asdict(MeshConfig()))

    config.train.update(asdict(TrainConfig(steps=STEPS, log_every=10, checkpoint_every=250)))
    config.optimizer.warmup_steps = 50
    config.optimizer.decay_steps = (STEPS * 4 // 5,)
    config.eval.limit = 0
    config.eval.checkpoint = -1
    config.predict.update(asdict(PredictConfig()))
    return config


def _of_checkpoint(checkpoint: str) -> ConfigDict:
    folder = find_model(checkpoint)
    config = parse_config(read_config(folder, "opendet")).to_config_dict()
    config.init.update(asdict(InitConfig(model=checkpoint if hub.is_name(checkpoint) else str(folder))))
    return config


def _small() -> ConfigDict:
    config = minilvis.get_config()
    config.model.text_width = 256
    config.model.t5.update(vocab_size=384, num_heads=4)
    config.data.text_embeddings = "hashed"
    config.data.text_table = ""
    config.data.tokenizer = "byt5"
    config.data.max_name_tokens = 32
    config.eval.max_new_tokens = 30
    return config
