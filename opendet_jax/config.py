"""Every choice the program offers, once: frozen dataclasses with their defaults, the paper's recipe.

A file in configs/ starts from `Config()`'s values as an ml_collections ConfigDict, changes fields, and returns it;
`config_files.parse_config` turns it back into frozen dataclasses and refuses what cannot work, naming the field.

Method: docs/method.md#12-paper-and-program.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from ml_collections import ConfigDict

from opendet_jax.errors import InputError


@dataclass(frozen=True)
class SwinConfig:
    embed_dim: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    window_size: int = 7
    drop_path_rate: float = 0.2


@dataclass(frozen=True)
class T5Config:
    """Sizes of the language model; the defaults are Flan-T5-base. Its width is `ModelConfig.text_width` (E)."""

    vocab_size: int = 32128  # V
    num_layers: int = 12  # encoder and decoder each
    num_heads: int = 12
    head_width: int = 64
    ffn_width: int = 2048
    gated: bool = True  # False: one ReLU layer, as in the first T5
    activation: Literal["gelu_tanh", "gelu_erf"] = (
        "gelu_tanh"  # docs/method.md#12-paper-and-program: tanh for Flan-T5, erf for the authors' files
    )
    relative_buckets: int = 32
    relative_max_distance: int = 128
    dropout: float = 0.1
    head_bias: bool = False  # only the authors' checkpoints have one
    lora_rank: int = 16
    lora_scale: float = 1 / 16


@dataclass(frozen=True)
class CLIPTextConfig:
    """Sizes of CLIP's text tower; the defaults are those of ViT-L/14@336px. Its output's width is E."""

    vocab_size: int = 49408
    width: int = 768
    num_layers: int = 12
    num_heads: int = 12
    ffn_width: int = 3072
    max_tokens: int = 77
    text_width: int = 768  # E
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    end_token: int = 49407


@dataclass(frozen=True)
class ModelConfig:
    backbone: SwinConfig = field(default_factory=SwinConfig)
    t5: T5Config = field(default_factory=T5Config)
    width: int = 256  # D
    text_width: int = 768  # E: text embeddings, VL-prompts and T5's d_model
    num_heads: int = 8
    num_points: int = 4  # deformable attention, per head and level
    ffn_width: int = 2048
    encoder_layers: int = 6
    one_to_many_layers: int = 4
    one_to_one_layers: int = 2
    max_queries: int = 900  # Q
    min_queries: int = 300  # taken when no token passes the threshold
    score_threshold: float = 0.05  # τ of Eq. 1
    query_fill: Literal["none", "program"] = "none"  # docs/method.md#12-paper-and-program
    denoising_queries: int = 200  # positives and negatives of all groups together
    denoising_labels: int = 92  # rows of the label embedding
    distiller_points: int = 16
    distiller_blocks: int = 2
    distiller_hidden: int = 2048
    distiller_dropout: float = 0.1
    prompt_dropout: float = 0.3
    generator_dropout: float = 0.1  # on the normalised prompt before T5
    normalise_prompts_at_inference: bool = False  # docs/method.md#12-paper-and-program
    dtype: Literal["float32", "bfloat16"] = "float32"  # of activations; parameters are float32
    remat: bool = False  # recompute layer activations in the backward pass: less memory, more time
    remat_keeps: Literal["nothing", "products"] = (
        "nothing"  # of a recomputed layer: its input alone, or matrix products
    )


@dataclass(frozen=True)
class Ablation:
    """Rows of the paper's tables 3, 4 and 5, each on by default."""

    object_detector: bool = True  # off: all layers one-to-one with one self-attention, min_queries fixed queries
    l_to_v: bool = True  # off: V-to-L alignment only
    distiller: bool = True  # off: queries projected straight into the language model, as GenerateU does
    lora_head: bool = True
    text_denoising: bool = True
    masked_alignment: bool = True  # off: labels of the matched text only
    joint_loss: bool = True  # off: focal loss only
    train_llm: bool = True  # off: only the language model's head trains


@dataclass(frozen=True)
class LossConfig:
    name_mask_threshold: float = 0.99  # the program has 0.999: docs/method.md#12-paper-and-program
    text_noise_probability: float = 0.9
    text_noise_sigma: Literal["real", "padded"] = "real"  # docs/method.md#7-object-name-generator


@dataclass(frozen=True)
class DatasetPaths:
    """Annotations in any form that docs/data.md has, and the folder of their images (none for a prepared folder)."""

    annotations: str = ""
    images: str = ""
    minival: bool = False  # of LVIS's val only the images of COCO's val2017
    name_field: str = ""  # field of an annotation that holds its names; empty: a known one, else the category's
    weight: float = 1.0  # training: how often an epoch shows each image


@dataclass(frozen=True)
class DataConfig:
    name: str = "lvis"  # names the folder of results
    source: Literal["json", "scenes"] = "json"  # scenes: generated on first use into `scenes_dir`
    train: DatasetPaths = field(default_factory=DatasetPaths)
    mixture: tuple[DatasetPaths, ...] = ()  # more to train on
    eval: DatasetPaths = field(default_factory=DatasetPaths)
    held_out: float = 0.1  # share of `train` that is evaluated on instead, where `eval` names no json
    held_out_by: Literal["photographs", "images"] = "photographs"  # copies on one side; images: by ids alone
    train_limit: int = 0  # first N images of each training json only; 0 = all
    max_unreadable: float = 0.01  # share of the training images that may be skipped because they cannot be read
    scenes_dir: str = ""  # empty: the workdir
    scenes_train: int = 4000
    scenes_eval: int = 300
    scenes_size: int = 128  # pixels a side
    text_embeddings: Literal["hashed", "table"] = "hashed"
    text_table: str = ""  # .npy of unit rows; the names are in the .json beside it
    tokenizer: str = "google/flan-t5-base"  # folder or hub name; "byt5" needs no file
    max_name_tokens: int = 32  # T, </s> included
    max_unwritable: float = 0.01  # share of the boxes whose names may be other ones in the tokenizer's tokens; 0 = none
    max_objects: int = 100  # G
    batch_size: int = 8
    buckets: tuple[tuple[int, int], ...] = ((800, 1344), (1344, 800), (1088, 1088))  # padded (H, W)
    train_short_sides: tuple[int, ...] = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    eval_short_side: int = 800
    max_long_side: int = 1333
    flip_probability: float = 0.5
    crop_probability: float = 0.5
    crop_short_sides: tuple[int, ...] = (400, 500, 600)
    crop_range: tuple[int, int] = (384, 600)
    threads: int = 2  # that read and decode images
    prefetch: int = 4  # batches made ahead


@dataclass(frozen=True)
class OptimizerConfig:
    detector_rate: float = 1e-4
    backbone_rate: float = 1e-5
    generator_rate: float = 2e-4
    weight_decay: float = 0.05
    clip_norm: float = 0.1
    decay_steps: tuple[int, ...] = (250_000,)  # the rate is divided by ten at each
    warmup_steps: int = 0
    # −1 = the whole run (pre-trained weights), 0 = never (training from nothing)
    freeze_head_steps: int = -1  # T5's head
    freeze_embedding_steps: int = -1  # T5's token embedding


@dataclass(frozen=True)
class InitConfig:
    """Folders written by `python -m opendet_jax.weights convert` that training starts from; empty: random numbers."""

    model: str = ""  # a whole model; a workdir of this program will do
    backbone: str = ""
    t5: str = ""


@dataclass(frozen=True)
class TrainConfig:
    steps: int = 300_000
    seed: int = 0
    accumulate: int = 1  # parts that a batch is cut into, one after the other: the memory of one part
    ema: float = 0.0  # decay of the moving average of the parameters that is evaluated; 0 = none is kept
    log_every: int = 50  # 0 = only the last step
    checkpoint_every: int = 5000
    eval_every: int = 0  # 0 = only after the last step; every evaluation has a checkpoint of its step
    keep_checkpoints: int = 3  # the newest
    keep_best: str = "AP"  # one more: the best by this metric of the evaluation; empty: only the newest
    non_finite: Literal["stop", "skip"] = "stop"  # what a loss or gradient that is not finite does
    replay: str = ""  # --mode=replay: the file of a batch that such a step left in <workdir>/non_finite/


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
    batch_size: int = 8
    checkpoint: int = -1  # step to restore; −1 = the newest
    name_mapping: Literal["exact", "text_encoder"] = "exact"  # from names to classes: docs/method.md#13-evaluation
    text_encoder: str = ""  # folder of CLIP's text tower, from `python -m opendet_jax.weights convert --from clip`
    alignment_analysis: bool = False  # the paper's section 4.3 and C.1, by a second pass over the images
    max_detections: int = 0  # boxes of an image that are named and counted, the best; 0 = all, as the paper has it
    nms_iou: float = 0.9  # applied when there are more than 300 queries
    min_score: float = 0.0
    num_beams: int = 3
    max_new_tokens: int = 30
    query_slots: tuple[int, ...] = (100, 300)  # sizes of the decoder's programs; one more has all model.max_queries
    naming_chunks: tuple[int, ...] = (10, 30, 100)  # prompts that a device names in one call: least time, most memory
    limit: int = 0  # first N images only; 0 = all
    pictures: int = 8


@dataclass(frozen=True)
class PredictConfig:
    inputs: str = ""  # glob of images
    output: str = ""  # folder; empty: <workdir>/predict
    max_detections: int = 100
    min_score: float = 0.3
    nms_iou: float = 0.9


@dataclass(frozen=True)
class Config:
    name: str = "swin_t"
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


class ConfigError(InputError):
    """A field that is unknown or holds a value that cannot work."""
