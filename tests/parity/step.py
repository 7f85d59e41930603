"""The training step that the authors' program computed, as ours computes it: inputs, losses, matchings."""

from dataclasses import replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from opendet_jax.batch import Objects
from opendet_jax.config import Ablation, LossConfig, ModelConfig, T5Config
from opendet_jax.losses.matching import match
from opendet_jax.losses.naming import TextNoise
from opendet_jax.losses.total import clean_targets, matching_sets, training_losses
from opendet_jax.model.denoising import denoising_slots
from opendet_jax.model.opendet import OpenDet, Training
from tests.parity.test_detector import images_of, noise
from tests.parity.vectors import Vectors, params_of

T5 = T5Config(vocab_size=512, num_layers=2, ffn_width=256, activation="gelu_erf", head_bias=True)
CONFIG = ModelConfig(query_fill="program", t5=T5)
LOSSES = LossConfig(text_noise_sigma="padded")
SPARE_QUERIES = 20  # empty slots beside the program's
SPARE_SLOTS = 2  # objects that are none


def with_spare(array: np.ndarray, slots: int, fill: float) -> np.ndarray:
    """An array of objects, images × objects × …, with spare places up to `slots`."""
    widths = [(0, 0), (0, slots - array.shape[1])] + [(0, 0)] * (array.ndim - 2)
    return np.pad(array, widths, constant_values=fill)


def program_objects(vectors: Vectors, slots: int) -> Objects:
    """The stored objects in `slots` places, with nonsense in every place without an object."""
    counts, tokens = vectors["objects/count"], vectors["objects/tokens"]
    valid = np.arange(slots) < counts[:, None]

    def padded(array: np.ndarray, fill: float) -> np.ndarray:
        return with_spare(array, slots, fill)

    return Objects(
        boxes=padded(vectors["objects/boxes"], 0.3),
        valid=valid,
        texts=np.where(valid[..., None], padded(vectors["objects/texts"], 0.0), np.float32(0.1)),
        tokens=np.where(valid[..., None], padded(np.where(tokens == -100, 0, tokens), 0), 5),
    )


class ProgramStep:
    """Everything that goes into the step of one file, and the functions of the parameters."""

    def __init__(self, vectors: Vectors, dtype: str = "float32"):
        self.vectors = vectors
        slots = min(CONFIG.max_queries, vectors["select/index"].shape[1] + SPARE_QUERIES)
        self.config = replace(CONFIG, max_queries=slots, dtype=dtype)
        self.model = OpenDet(self.config)
        places = vectors["objects/boxes"].shape[1] + SPARE_SLOTS
        self.objects = program_objects(vectors, places)
        self.text_noise = TextNoise(
            normal=jnp.asarray(with_spare(vectors["text_noise/normal"], places, 0.0)),
            uniform=jnp.asarray(with_spare(vectors["text_noise/uniform"], places, 0.0)),
        )
        self.randoms = noise(vectors, "dn/random", vectors["objects/count"], denoising_slots(CONFIG, places))

    @cached_property
    def params(self) -> dict[str, Any]:
        return params_of(self.vectors)

    def forward(self, params: dict[str, Any]) -> Training:
        variables = {"params": params}
        return self.model.apply(variables, images_of(self.vectors), self.objects, self.randoms, deterministic=True)

    def losses(self, params: dict[str, Any], training: Training) -> dict[str, jax.Array]:
        def distil(hidden, boxes):
            seen = (training.features, training.memory)
            return self.model.apply({"params": params}, hidden, boxes, *seen, deterministic=True, method="distil")

        def token_losses(params, prompts, tokens, keys):
            return self.model.apply({"params": params}, prompts, tokens, deterministic=True, method="token_losses")

        language_model = Partial(token_losses, {"name_generator": params["name_generator"]})
        _, terms = training_losses(
            training,
            self.objects,
            self.text_noise,
            distil,
            language_model,
            jax.random.key(0),
            self.config,
            Ablation(),
            LOSSES,
        )
        return terms

    def matched(self, training: Training) -> dict[str, jax.Array]:
        """The object of each query, B × Q, of every set."""
        targets, matched = clean_targets(self.objects), {}
        for mode, (names, predictions) in matching_sets(training, targets, self.config, Ablation()).items():
            matched |= dict(zip(names, match(predictions, targets, mode).object, strict=True))
        return matched


def stored_terms(names: np.ndarray, values: np.ndarray) -> dict[str, Any]:
    """Under our names; the program has Joint and focal loss in one, here "objectness/…"."""
    ours = {"loss_bbox": "l1", "loss_giou": "giou", "loss_bce": "objectness", "loss_ce": "alignment"}
    distillation = {
        "indices_pred_vl_mse": "layer_6",
        "indices_aux_pred_4_vl_mse": "layer_5",
        "indices_pred_dn_vl_mse": "denoising_6",
        "indices_aux_pred_dn_4_vl_mse": "denoising_5",
    }
    terms = {}
    for name, value in zip(names, values, strict=True):
        if name in distillation:
            terms[f"distillation/{distillation[name]}"] = value
        elif name in ("t5_loss", "t5_clip_noise"):
            terms["naming" if name == "t5_loss" else "text_denoising"] = value
        elif (loss := "_".join(str(name).split("_")[:2])) in ours:
            rest = str(name).split("_")[2:]
            layer = int(rest[-1]) + 1 if rest and rest[-1].isdigit() else 6
            of = "encoder" if rest == ["interm"] else f"{'denoising' if 'dn' in rest else 'layer'}_{layer}"
            terms[f"{ours[loss]}/{of}"] = value
    return terms


def program_terms(terms: dict[str, Any]) -> dict[str, Any]:
    """Ours, joined as the program has them."""
    joined = {name: value for name, value in terms.items() if name.split("/")[0] not in ("joint", "focal", "total")}
    for name, value in terms.items():
        if name.startswith("joint/"):
            joined[name.replace("joint", "objectness")] = value + terms[name.replace("joint", "focal")]
    return joined
