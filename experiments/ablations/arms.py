"""The arms of the protocol: what each of them changes in one config, their seeds, and the order in which they run."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32
from ml_collections import ConfigDict
from numpy import ndarray

from configs import scenes_tiny
from configs.generateu_t import as_generateu
from opendet_jax.config import Config
from opendet_jax.config_files import parse_config
from opendet_jax.data.scene_drawing import KINDS
from opendet_jax.data.text_embeddings import HashedEmbedder, TextEmbedder, table_key
from opendet_jax.model.encoder import Memory
from opendet_jax.model.layers import Pyramid
from opendet_jax.model.neck import Features
from opendet_jax.model.opendet import Detected, OpenDet
from opendet_jax.model.query_selection import Queries

STEPS = 700
EVALUATED = (175, 350, 525, 700)  # steps after which a run is evaluated
DECAY = (525, 630)  # steps from which rates are a tenth, and a hundredth
SIZE = 96  # pixels a side of the scenes
SCENES_TRAIN, SCENES_EVAL = 4000, 200
SEEDS = tuple(range(6))
PILOT_SEEDS = range(900, 1000)  # of runs that size and steps were chosen by; none of the protocol's
FULL, BASELINE = "full", "generateu"


class Arm(NamedTuple):
    name: str
    title: str
    off: tuple[str, ...] = ()  # fields of config.ablation
    generateu: bool = False  # the baseline; `off` then adds to what it lacks, and `on` takes away
    on: tuple[str, ...] = ()
    texts: Literal["hashed", "shuffled"] = "hashed"
    distiller_sees: Literal["features", "noise"] = "features"


# In the order in which they run: all seeds of an arm after each other.
ARMS = {
    arm.name: arm
    for arm in (
        Arm(FULL, "Open-Det"),
        Arm(BASELINE, "GenerateU", generateu=True),
        Arm("frozen_llm", "Open-Det, LLM frozen", off=("train_llm",)),
        Arm("no_distiller", "without the distiller", off=("distiller",)),
        Arm("no_object_detector", "without the object detector", off=("object_detector",)),
        Arm("generateu_frozen_llm", "GenerateU, LLM frozen", generateu=True, off=("train_llm",)),
        Arm("no_joint_loss", "without Joint Loss", off=("joint_loss",)),
        Arm("no_text_denoising", "without Text Denoising", off=("text_denoising",)),
        Arm("no_lora_head", "without the LoRA head", off=("lora_head",)),
        Arm("no_aligner", "without the aligner", off=("aligner", "l_to_v")),
        Arm("shuffled_texts", "text table shuffled", texts="shuffled"),
        Arm("noise_fed_distiller", "distiller fed with noise", distiller_sees="noise"),
        Arm("ladder_detector", "GenerateU + object detector", generateu=True, on=("object_detector",)),
        Arm("ladder_aligner", "… + aligner", generateu=True, on=("object_detector", "aligner", "l_to_v")),
        Arm(
            "ladder_distiller",
            "… + distiller",
            generateu=True,
            on=("object_detector", "aligner", "l_to_v", "distiller"),
        ),
    )
}  # fmt: skip


def config_of(arm: Arm, seed: int) -> Config:
    """Of the run of an arm with a seed; where its scenes lie is not said yet (trial.py)."""
    config = scenes_tiny.get_config()
    detector = {name: config.model[name] for name in ("max_queries", "min_queries", "denoising_queries")}
    if arm.generateu:
        as_generateu(config, queries=config.model.max_queries)
    config.ablation.update({**dict.fromkeys(arm.off, False), **dict.fromkeys(arm.on, True)})
    if config.ablation.object_detector:
        config.model.update(detector)
    else:  # part of it, in the paper: queries by a threshold, and denoising queries
        config.model.update(min_queries=config.model.max_queries, denoising_queries=0)
    config.name = f"{arm.name}_{seed}"
    _schedule(config, seed)
    return parse_config(config)


def _schedule(config: ConfigDict, seed: int) -> None:
    config.train.update(seed=seed, steps=STEPS)
    config.data.update(scenes_size=SIZE, buckets=((SIZE, SIZE),), train_short_sides=(SIZE * 7 // 8, SIZE))
    config.data.update(eval_short_side=SIZE, max_long_side=SIZE)
    config.optimizer.update(decay_steps=DECAY)
    config.optimizer.update(backbone_rate=config.optimizer.detector_rate / 10)  # a pre-trained one: the paper's ratio
    # The language model is a pre-trained one: as in the paper its head and token embedding keep their weights.
    config.optimizer.update(freeze_head_steps=-1, freeze_embedding_steps=-1)
    config.eval.update(max_detections=12, naming_chunks=(192,), pictures=0)


def without_seed(config: Config) -> Config:
    """What the runs of an arm have in common: one program serves them all."""
    return replace(config, name="", train=replace(config.train, seed=0))


def embedder_of(arm: Arm, width: int) -> TextEmbedder:
    return ShuffledEmbedder(width) if arm.texts == "shuffled" else HashedEmbedder(width)


def model_of(arm: Arm, config: Config) -> OpenDet:
    kind = NoiseFedOpenDet if arm.distiller_sees == "noise" else OpenDet
    return kind(config.model, config.ablation)


class ShuffledEmbedder(HashedEmbedder):
    """A negative control: every name of the scenes has the embedding of another one, always the same.

    Which name is which can be learnt as before. What nearness of embeddings says of nearness of names is gone.
    """

    def __init__(self, width: int):
        super().__init__(width)
        names = [kind.name for kind in KINDS]
        ring = np.random.default_rng(self.SEED).permutation(names).tolist()
        self._other = dict(zip(ring, [*ring[1:], ring[0]], strict=True))

    def embed(self, names: Sequence[str]) -> Float32[ndarray, "n E"]:
        return super().embed([self._other[table_key(name)] for name in names])


class NoiseFedOpenDet(OpenDet):
    """A negative control: what the distiller's branches look at is noise, the same for every image.

    Its mean and spread are those of the features that it stands for. Prompts know of the image what the query does.
    """

    def distil(self, hidden, boxes, features: Features, memory: Memory, deterministic: bool) -> Any:
        return self.distiller(hidden, boxes, noise_like(features, 0), noise_like(memory, 1), deterministic)

    def decode(self, features: Features, memory: Memory, queries: Queries) -> Detected:
        detected = super().decode(features, memory, queries)
        seen = (noise_like(features, 0), noise_like(memory, 1))
        prompts = self.distiller(detected.decoded.hidden[-1], detected.decoded.boxes[-1], *seen, deterministic=True)
        return detected.replace(prompts=prompts.language)


def noise_like(pyramid: Pyramid, number: int) -> Any:
    """The pyramid with tokens that say nothing of its images, and have no gradient."""
    tokens = jax.lax.stop_gradient(pyramid.tokens)
    noise = jax.random.normal(jax.random.key(number), tokens.shape[1:], tokens.dtype)
    return pyramid.replace(tokens=jnp.broadcast_to(tokens.mean() + tokens.std() * noise, tokens.shape))
