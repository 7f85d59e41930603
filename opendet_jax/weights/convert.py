"""PyTorch weights → a folder of ours, and back: what each kind of source needs beside its table of rules."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from opendet_jax.checkpoints.folder import Converted
from opendet_jax.config import Config, SwinConfig, T5Config
from opendet_jax.errors import WeightsError
from opendet_jax.model.clip_text import clip_text_shapes
from opendet_jax.model.opendet import OpenDet, init_params
from opendet_jax.model.swin import Swin
from opendet_jax.model.t5 import T5
from opendet_jax.weights.backbone import AUTHORS_SWIN_RULES, SWIN_RULES, hugging_face_rules
from opendet_jax.weights.open_det import GENERATOR, OPENDET_RULES
from opendet_jax.weights.rules import Rules, Shape, shapes_of
from opendet_jax.weights.sizes import clip_sizes, swin_sizes, t5_sizes
from opendet_jax.weights.source import Source
from opendet_jax.weights.text import CLIP_RULES, T5_RULES

KINDS = ("opendet", "swin", "t5", "clip")
# What is known of the published files; a model card beside the weights has precedence.
LICENCES = {
    "opendet": "not stated in the file: see the authors' repository, https://github.com/Med-Process/Open-Det",
    "swin": "MIT (as published by the Swin authors)",
    "t5": "Apache-2.0 (as published by Google)",
    "clip": "MIT (as published by OpenAI)",
}
BACKBONE = "detr.detr.backbone.0."
NAMES = {(96, 6): "swin_t", (96, 18): "swin_s", (128, 18): "swin_b", (192, 18): "swin_l"}


def convert(kind: str, source: Source, tokenizer: str = "") -> Converted:
    """Raises WeightsError listing everything that does not fit. `tokenizer`: for a whole model, its T5 tokenizer."""
    if kind == "opendet":
        return _opendet(source, tokenizer)
    return {"swin": _swin, "t5": _t5, "clip": _clip}[kind](source)


def _shapes(state: Mapping[str, np.ndarray]) -> dict[str, Shape]:
    return {name: tuple(value.shape) for name, value in state.items()}


def _opendet(source: Source, tokenizer: str) -> Converted:
    config = opendet_config(_shapes(source.state), tokenizer)
    model = OpenDet(config.model, config.ablation)
    wanted = shapes_of(jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0)))
    return Converted("opendet", config.to_dict(), OPENDET_RULES.to_ours(source.state, wanted))


def opendet_config(shapes: Mapping[str, Shape], tokenizer: str = "") -> Config:
    """An authors' checkpoint's Config: its sizes, and erf GELU in T5 (docs/method.md#12-paper-and-program)."""
    if not any(name.startswith("detr.") for name in shapes):
        some = ", ".join(list(shapes)[:3])
        raise WeightsError(
            f"not a checkpoint of Open-Det: of its {len(shapes)} names ({some}, …) none starts with 'detr.'"
        )
    backbone = swin_sizes(shapes, BACKBONE)
    sizes, width = t5_sizes(shapes, {}, f"{GENERATOR}.t5_model.")
    default = Config()
    return replace(
        default,
        name=f"opendet_{NAMES.get((backbone.embed_dim, backbone.depths[2]), 'swin')}",
        model=replace(default.model, backbone=backbone, t5=replace(sizes, activation="gelu_erf"), text_width=width),
        data=replace(default.data, tokenizer=tokenizer or default.data.tokenizer),
    )


def swin_shapes(config: SwinConfig) -> dict[str, Shape]:
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    return shapes_of(jax.eval_shape(Swin(config).init, jax.random.key(0), image)["params"])


def _swin(source: Source) -> Converted:
    config = swin_sizes(_shapes(source.state))
    if "patch_embed.proj.weight" in source.state:
        rules = AUTHORS_SWIN_RULES
    else:
        rules = hugging_face_rules("swin." if "swin.embeddings.norm.weight" in source.state else "")
    wanted = swin_shapes(config)
    state = dict(source.state)
    if not any(rules.place(name).path == "norm1/scale" for name in state if _known(rules, name)):
        # A classifier has no norms on its middle stages: they start as the detector's do, and learn there.
        for number in (1, 2, 3):
            for kind, fill in (("scale", 1.0), ("bias", 0.0)):
                [(name, _, _)] = rules.names(f"norm{number}/{kind}")
                state[name] = np.full(wanted[f"norm{number}/{kind}"], fill, np.float32)
    return Converted("swin", asdict(config), rules.to_ours(state, wanted))


def _known(rules: Rules, name: str) -> bool:
    try:
        rules.place(name)
    except KeyError:
        return False
    return True


def t5_shapes(config: T5Config, width: int) -> dict[str, Shape]:
    """Without LoRA, which a pre-trained T5 does not have."""

    def everything(model: T5):
        tokens = jnp.ones((1, 1), jnp.int32)
        memory = model.encode(jnp.ones((1, 1, width)), True)
        return model.head(model.decode(tokens, memory, tokens > 0, True))

    model = T5(config, width, lora=False, dtype=jnp.dtype("float32"))
    return shapes_of(jax.eval_shape(lambda key: model.init(key, method=everything), jax.random.key(0))["params"])


def _t5(source: Source) -> Converted:
    config, width = t5_sizes(_shapes(source.state), source.config)
    state = dict(source.state)
    if "lm_head.weight" not in state:
        # Head and embedding are one matrix; the first T5 scales what enters the head by d^-½, here part of the head.
        scaled = source.config.get("scale_decoder_outputs", source.config.get("tie_word_embeddings", True) is not False)
        state["lm_head.weight"] = state["shared.weight"] * np.float32(width**-0.5 if scaled else 1.0)
    params = T5_RULES.to_ours(state, t5_shapes(config, width))
    return Converted("t5", {**asdict(config), "text_width": width}, params)


def _clip(source: Source) -> Converted:
    config = clip_sizes(_shapes(source.state), source.config)
    wanted = shapes_of(clip_text_shapes(config))
    return Converted("clip", asdict(config), CLIP_RULES.to_ours(source.state, wanted))


LAYOUTS = {
    "opendet": OPENDET_RULES,  # every name that an output depends on, shared tensors under all their names
    "swin": AUTHORS_SWIN_RULES,
    "swin_hugging_face": SWIN_RULES,
    "t5": T5_RULES,
}


def export(params: Mapping[str, Any], layout: str) -> dict[str, np.ndarray]:
    """The parameters of a whole model, a Swin or a T5 (without LoRA: see `merged`) under the names of a layout."""
    return LAYOUTS[layout].to_theirs(params)


def merged(params: Mapping[str, Any], scale: float) -> dict[str, Any]:
    """T5's parameters with the low-rank corrections of head and embedding added in, as Hugging Face's T5 has them."""
    out = dict(params)
    for name, matrix in (("lm_head", "kernel"), ("shared", "embedding")):
        parts = {key: np.asarray(value) for key, value in params[name].items()}
        if "lora_A" in parts:
            parts[matrix] = parts[matrix] + scale * (parts.pop("lora_A") @ parts.pop("lora_B"))
        out[name] = parts
    return out
