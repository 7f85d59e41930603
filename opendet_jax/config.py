"""Every choice the program offers, once: frozen dataclasses with their defaults, the paper's recipe.

A file in configs/ starts from `Config()`'s values as an ml_collections ConfigDict, changes fields, and returns it;
`config_files.parse_config` turns it back into frozen dataclasses and refuses what cannot work, naming the field.

Method: docs/method.md#12-paper-and-program.
"""

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ml_collections import ConfigDict

from opendet_jax.errors import InputError


@dataclass(frozen=True)
class SwinConfig:
    embed_dim: int = 96  # channels of the first stage; each further stage doubles them
    depths: tuple[int, ...] = (2, 2, 6, 2)  # blocks of the four stages
    num_heads: tuple[int, ...] = (3, 6, 12, 24)  # attention heads of the four stages
    window_size: int = 7  # tokens a side of an attention window
    drop_path_rate: float = 0.2  # of the last block; rises to it from 0 at the first


@dataclass(frozen=True)
class T5Config:
    """Sizes of the language model; the defaults are Flan-T5-base. Its width is `ModelConfig.text_width` (E)."""

    vocab_size: int = 32128  # V: tokens known
    num_layers: int = 12  # encoder and decoder each
    num_heads: int = 12  # attention heads
    head_width: int = 64  # channels of an attention head
    ffn_width: int = 2048  # neurons of a feed-forward layer
    gated: bool = True  # False: one ReLU layer, as in the first T5
    activation: Literal["gelu_tanh", "gelu_erf"] = "gelu_tanh"  # tanh for Flan-T5, erf for the authors' files
    relative_buckets: int = 32  # of relative positions that share a bias
    relative_max_distance: int = 128  # tokens; all that is further shares the last bucket
    dropout: float = 0.1  # rate, everywhere in T5
    head_bias: bool = False  # only the authors' checkpoints have one
    lora_rank: int = 16  # of the corrections of head and token embedding
    lora_scale: float = 1 / 16  # factor of the corrections


@dataclass(frozen=True)
class CLIPTextConfig:
    """Sizes of CLIP's text tower; the defaults are those of ViT-L/14@336px. Its output's width is E."""

    vocab_size: int = 49408  # tokens
    width: int = 768  # channels
    num_layers: int = 12  # blocks
    num_heads: int = 12  # attention heads
    ffn_width: int = 3072  # neurons of a feed-forward layer
    max_tokens: int = 77  # positions
    text_width: int = 768  # E: of the embedding
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"  # of the feed-forward layers
    end_token: int = 49407  # whose state becomes the embedding


@dataclass(frozen=True)
class ModelConfig:
    backbone: SwinConfig = field(default_factory=SwinConfig)
    t5: T5Config = field(default_factory=T5Config)
    width: int = 256  # D: of tokens and queries
    text_width: int = 768  # E: text embeddings, VL-prompts and T5's d_model
    num_heads: int = 8  # attention heads of encoder, decoder, aligner and distiller
    num_points: int = 4  # deformable attention, per head and level
    ffn_width: int = 2048  # neurons of a feed-forward layer
    encoder_layers: int = 6  # deformable self-attention layers
    one_to_many_layers: int = 4  # decoder layers that learn from two queries an object
    one_to_one_layers: int = 2  # decoder layers after them that learn from one query an object
    max_queries: int = 900  # Q: of an image at most
    min_queries: int = 300  # taken when no token passes the threshold
    score_threshold: float = 0.05  # τ of Eq. 1
    query_fill: Literal["none", "program"] = "none"  # "program": few queries are topped up as the authors' program does
    denoising_queries: int = 200  # positives and negatives of all groups together; 0 = none, and no label embedding
    denoising_labels: int = 92  # rows of the label embedding
    distiller_points: int = 16  # deformable attention of distiller and aligner, per head and level
    distiller_blocks: int = 2  # in each of the two branches
    distiller_hidden: int = 2048  # neurons of the projections φ
    distiller_dropout: float = 0.1  # rate, in blocks and projections
    prompt_dropout: float = 0.3  # rate, on the prompts that go to the language model
    generator_dropout: float = 0.1  # rate, on the normalised prompt before T5
    normalise_prompts_at_inference: bool = False  # as in training; the authors' program does not
    dtype: Literal["float32", "bfloat16"] = "float32"  # of activations; parameters are float32
    remat: bool = False  # recompute layer activations in the backward pass: less memory, more time
    remat_keeps: Literal["nothing", "products"] = "nothing"  # of a recomputed layer: its input alone, or products too


@dataclass(frozen=True)
class Ablation:
    """Rows of the paper's tables 3, 4 and 5, each on by default."""

    object_detector: bool = True  # off: all layers one-to-one with one self-attention, min_queries fixed queries
    aligner: bool = True  # off: V-to-L is a dot product with the plain query, as in GenerateU
    l_to_v: bool = True  # off: V-to-L alignment only
    distiller: bool = True  # off: queries projected straight into the language model, as GenerateU does
    lora_head: bool = True  # off: no low-rank correction of T5's head
    text_denoising: bool = True  # off: no loss from disturbed text embeddings
    masked_alignment: bool = True  # off: labels of the matched text only
    joint_loss: bool = True  # off: focal loss only
    train_llm: bool = True  # off: only the language model's head trains


@dataclass(frozen=True)
class LossConfig:
    name_mask_threshold: float = 0.99  # cosine from which two texts are one name; the authors' program has 0.999
    text_noise_probability: float = 0.9  # that a number of a text embedding is disturbed
    text_noise_sigma: Literal["real", "padded"] = "real"  # rows that σ is of; padded: empty ones too, as the program's


YAML = (".yaml", ".yml")


def split_of(annotations: str | Path) -> tuple[Path, str]:
    """A path, and the split that is named behind it: "test" of "dogs/data.yaml:test"; empty where none is."""
    path, _, split = str(annotations).rpartition(":")
    if path and not os.path.exists(annotations) and os.path.exists(path):
        return Path(path), split
    return Path(annotations), ""


@dataclass(frozen=True)
class DatasetPaths:
    """Annotations in any form of docs/data.md, and the folder of their images (none for a prepared folder)."""

    annotations: str = ""  # path of a json, a data.yaml, or a folder: a prepared one, or Pascal VOC's
    images: str = ""  # path of the folder of pictures
    minival: bool = False  # of LVIS's val only the images of COCO's val2017
    name_field: str = ""  # field of an annotation that holds its names; empty: a known one, else the category's
    weight: float = 1.0  # training: how often an epoch shows each image


@dataclass(frozen=True)
class DataConfig:
    name: str = "lvis"  # names the folder of results
    source: Literal["json", "scenes"] = "json"  # scenes: generated on first use into `scenes_dir`
    train: DatasetPaths = field(default_factory=DatasetPaths)  # to train on
    mixture: tuple[DatasetPaths, ...] = ()  # more to train on
    eval: DatasetPaths = field(default_factory=DatasetPaths)  # to evaluate on; none named: part of `train`
    held_out: float = 0.1  # share of `train` that is evaluated on instead, where `eval` names no json
    held_out_by: Literal["photographs", "images"] = "photographs"  # copies on one side; images: by ids alone
    train_limit: int = 0  # first N images of each training json only; 0 = all
    max_unreadable: float = 0.01  # share of the training images that may be skipped because they cannot be read
    max_pixels: int = 178_956_970  # of a picture, width × height; larger ones are refused. The default is Pillow's own
    scenes_dir: str = ""  # folder of the drawn scenes; empty: the workdir
    scenes_train: int = 4000  # scenes to train on
    scenes_eval: int = 300  # scenes to evaluate on
    scenes_size: int = 128  # pixels a side
    text_embeddings: Literal["hashed", "table"] = "hashed"  # hashed letters, a stand-in for a table, know no meaning
    text_table: str = ""  # .npy of unit rows; the names are in the .json beside it
    tokenizer: str = "google/flan-t5-base"  # folder or hub name; "byt5" needs no file
    max_name_tokens: int = 32  # T: of a name in training, the end token included
    max_unwritable: float = 0.01  # share of the boxes whose names may be other ones in the tokenizer's tokens; 0 = none
    max_objects: int = 100  # G: of an image; of more a random choice at each step
    batch_size: int = 8  # images of a step, on all devices together
    buckets: tuple[tuple[int, int], ...] = ((800, 1344), (1344, 800), (1088, 1088))  # padded (H, W)
    # pixels of the shorter side, one drawn an image
    train_short_sides: tuple[int, ...] = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    eval_short_side: int = 800  # pixels of the shorter side in evaluation and prediction
    max_long_side: int = 1333  # pixels of the longer side at most
    flip_probability: float = 0.5  # that an image is mirrored
    crop_probability: float = 0.5  # that an image is cropped
    crop_short_sides: tuple[int, ...] = (400, 500, 600)  # pixels of the shorter side before a crop, one drawn an image
    crop_range: tuple[int, int] = (384, 600)  # pixels a side of a crop, least and most
    threads: int = 2  # that read and decode images
    prefetch: int = 4  # batches made ahead


@dataclass(frozen=True)
class OptimizerConfig:
    detector_rate: float = 1e-4  # learning rate of everything but the next two
    backbone_rate: float = 1e-5  # learning rate of the backbone
    generator_rate: float = 2e-4  # learning rate of the language model
    weight_decay: float = 0.05  # AdamW's, of every parameter that trains
    clip_norm: float = 0.1  # largest global norm of the gradients
    decay_steps: tuple[int, ...] = (250_000,)  # the rate is divided by ten at each
    warmup_steps: int = 0  # over which the rates rise from 0
    freeze_head_steps: int = -1  # of T5's head; −1 = the whole run (pre-trained weights), 0 = never (from nothing)
    freeze_embedding_steps: int = -1  # of T5's token embedding; −1 and 0 as above


@dataclass(frozen=True)
class InitConfig:
    """Folders written by `python -m opendet_jax.weights convert` that training starts from; empty: random numbers."""

    model: str = ""  # a whole model: a workdir of this program will do, or hf://user/model
    backbone: str = ""  # a Swin
    t5: str = ""  # a T5


@dataclass(frozen=True)
class TrainConfig:
    steps: int = 300_000  # at which training ends
    seed: int = 0  # of parameters, order, augmentation, dropout and noise
    accumulate: int = 1  # parts that a batch is cut into, one after the other: the memory of one part
    ema: float = 0.0  # decay of the moving average of the parameters that is evaluated; 0 = none is kept
    log_every: int = 50  # steps; 0 = only the last
    checkpoint_every: int = 5000  # steps; 0 = only the last
    eval_every: int = 0  # steps, each with a checkpoint; 0 = only after the last
    keep_checkpoints: int = 3  # so many of the newest stay
    keep_best: str = "AP"  # one more: the best by this metric of the evaluation; empty: only the newest
    non_finite: Literal["stop", "skip"] = "stop"  # at a loss or gradient that is not finite: end, or skip the update
    replay: str = ""  # --mode=replay: the file of a batch that such a step left in non_finite/ of the workdir


@dataclass(frozen=True)
class MeshConfig:
    """The devices of a run, in three axes, and the processes that hold them. docs/scaling.md explains.

    One of the sizes may be −1: as many as there are devices left. Images are split over `data` × `fsdp`.
    """

    data: int = -1  # copies of the parameters
    fsdp: int = 1  # parts in which each copy of the large parameters and of their optimizer state is stored
    tensor: int = 1  # devices that share the large matrix products of an image; all of one process
    processes: int = 1  # 0: as the cluster says (TPU pod, SLURM, Open MPI)
    process: int = 0  # this one's number, where `processes` is given
    coordinator: str = ""  # host:port of process 0, where `processes` is given


@dataclass(frozen=True)
class EvalConfig:
    batch_size: int = 8  # images, on all devices of a process together
    checkpoint: int = -1  # step to restore; −1 = the newest
    name_mapping: Literal["exact", "text_encoder"] = "exact"  # from names to classes: docs/evaluate.md
    text_encoder: str = ""  # folder of CLIP's text tower, from `python -m opendet_jax.weights convert --from clip`
    alignment_analysis: bool = False  # the paper's section 4.3 and C.1, by a second pass over the images
    max_detections: int = 0  # boxes of an image that are named and counted, the best; 0 = all, as the paper has it
    nms_iou: float = 0.9  # overlap above which the worse of two boxes goes, in images of more than 300 queries
    min_score: float = 0.0  # of boxes that are named and counted
    names: Literal["generated", "given"] = "generated"  # or chosen among those of the data set's classes
    given_by: Literal["language", "alignment"] = "language"  # how, as `predict.by`
    num_beams: int = 3  # of the search for names
    max_new_tokens: int = 30  # of a generated name, the end token included
    query_slots: tuple[int, ...] = (100, 300)  # sizes of the decoder's programs; one more has all model.max_queries
    naming_chunks: tuple[int, ...] = (10, 30, 100)  # prompts that a device names in one call: least time, most memory
    limit: int = 0  # first N images only; 0 = all
    clip_truth: bool = False  # true boxes clipped to their pictures; False: as written, as pycocotools has them
    pictures: int = 8  # images shown with truth beside prediction


@dataclass(frozen=True)
class PredictConfig:
    inputs: str = ""  # a picture, a folder of them, or a glob; several on lines of their own
    output: str = ""  # folder; empty: predict/ in the workdir
    max_detections: int = 100  # boxes of an image, the best
    min_score: float = 0.3  # of boxes that are shown
    nms_iou: float = 0.9  # overlap above which the worse of two boxes goes
    batch_size: int = 1  # images of one padded size that are detected together: docs/python.md#many-pictures
    names: str = ""  # to choose from, separated by commas or on lines of their own; empty: the model makes them up
    by: Literal["language", "alignment"] = "language"  # how it chooses among them: docs/python.md


@dataclass(frozen=True)
class Config:
    name: str = "swin_t"  # of the run
    model: ModelConfig = field(default_factory=ModelConfig)
    ablation: Ablation = field(default_factory=Ablation)
    loss: LossConfig = field(default_factory=LossConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    init: InitConfig = field(default_factory=InitConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    predict: PredictConfig = field(default_factory=PredictConfig)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def to_config_dict(self) -> ConfigDict:
        """The same values as an editable ConfigDict, for files in configs/ and for command-line overrides."""
        return ConfigDict(self.to_dict(), convert_dict=True)


def config_hash(config: Config) -> str:
    """Twelve letters that stand for every value of the config."""
    text = json.dumps(config.to_dict(), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


class ConfigError(InputError):
    """A field that is unknown or holds a value that cannot work."""
