"""PyTorch weights → a folder of ours, and back: what each kind of source needs beside its table of rules.

Method: docs/method.md#12-paper-and-program, for the authors' checkpoints.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
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
from opendet_jax.weights import backbone
from opendet_jax.weights.backbone import AUTHORS_SWIN_RULES, SWIN_RULES, TIMM_SWIN_RULES, hugging_face_rules
from opendet_jax.weights.open_det import GENERATOR, OPENDET_RULES
from opendet_jax.weights.rules import Rules, Shape, shapes_of
from opendet_jax.weights.sizes import clip_sizes, swin_sizes, t5_sizes
from opendet_jax.weights.source import Source
from opendet_jax.weights.text import CLIP_RULES, EMBEDDINGS, T5_RULES
from opendet_jax.weights.unwrap import some, without_wrapper

BACKBONE = "detr.detr.backbone.0."
NAMES = {(96, 6): "swin_t", (96, 18): "swin_s", (128, 18): "swin_b", (192, 18): "swin_l"}
# Names that show what stands before all names of a model (`without_wrapper`).
ANCHORS = {
    "opendet": (f"{BACKBONE}patch_embed.proj.weight",),
    "swin": backbone.ANCHORS,
    "t5": ("encoder.block.0.layer.0.SelfAttention.q.weight",),
    "clip": ("text_model.embeddings.token_embedding.weight",),
}


@dataclass(frozen=True)
class Conversion:
    """What became of a source, tensor by tensor."""

    converted: Converted
    used: int  # tensors
    left_out: Mapping[str, Sequence[str]]  # tensors that no output depends on, by what they are
    notes: tuple[str, ...]  # what else was decided, a line each

    def describe(self) -> list[str]:
        """Lines for the person who converts: what was decided, what was used, and what was left out and why."""
        count = sum(map(len, self.left_out.values()))
        lines = [*self.notes, f"{self.used} of {self.used + count} tensors used, {count} left out"]
        return lines + [f"left out: {len(names)}, {why} ({some(names)})" for why, names in self.left_out.items()]


def convert(kind: str, source: Source, tokenizer: str = "") -> Conversion:
    """Raises WeightsError listing everything that does not fit. `tokenizer`: for a whole model, its T5 tokenizer."""
    found = without_wrapper(source.state, ANCHORS[kind], source.name)
    state, notes = found.state, (*source.notes, *found.notes)
    if kind == "opendet":
        if not tokenizer:
            notes += (f"the tokenizer will be {Config().data.tokenizer}, which is not looked for here",)
        return _conversion(_opendet(state, tokenizer), OPENDET_RULES, state, notes)
    if kind == "swin":
        return _swin(state, notes)
    return (_t5 if kind == "t5" else _clip)(state, source.config, notes)


def _conversion(converted: Converted, rules: Rules, state: Mapping[str, Any], notes: tuple[str, ...]) -> Conversion:
    left_out = rules.left_out(state)
    return Conversion(converted, len(state) - sum(map(len, left_out.values())), left_out, notes)


def _shapes(state: Mapping[str, np.ndarray]) -> dict[str, Shape]:
    return {name: tuple(value.shape) for name, value in state.items()}


def _opendet(state: Mapping[str, np.ndarray], tokenizer: str) -> Converted:
    config = opendet_config(_shapes(state), tokenizer)
    model = OpenDet(config.model, config.ablation)
    wanted = shapes_of(jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0)))
    return Converted("opendet", config.to_dict(), OPENDET_RULES.to_ours(state, wanted))


def opendet_config(shapes: Mapping[str, Shape], tokenizer: str = "") -> Config:
    """An authors' checkpoint's Config: its sizes, and erf GELU in T5 (docs/method.md#12-paper-and-program)."""
    if not any(name.startswith("detr.") for name in shapes):
        some = ", ".join(list(shapes)[:3])
        raise WeightsError(
            f"not a checkpoint of Open-Det: of its {len(shapes)} names ({some}, …) none starts with 'detr.'"
        )
    swin = swin_sizes(shapes, BACKBONE)
    sizes, width = t5_sizes(shapes, {}, f"{GENERATOR}.t5_model.")
    default = Config()
    return replace(
        default,
        name=f"opendet_{NAMES.get((swin.embed_dim, swin.depths[2]), 'swin')}",
        model=replace(default.model, backbone=swin, t5=replace(sizes, activation="gelu_erf"), text_width=width),
        data=replace(default.data, tokenizer=tokenizer or default.data.tokenizer),
    )


def swin_shapes(config: SwinConfig) -> dict[str, Shape]:
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    return shapes_of(jax.eval_shape(Swin(config).init, jax.random.key(0), image)["params"])


def _swin(source: Mapping[str, np.ndarray], notes: tuple[str, ...]) -> Conversion:
    state = backbone.with_names_of_files(source)
    config = swin_sizes(_shapes(state))
    if "patch_embed.proj.weight" not in state:
        rules = hugging_face_rules("swin." if "swin.embeddings.norm.weight" in state else "")
    elif backbone.is_timms(state):
        rules = TIMM_SWIN_RULES
    else:
        rules = AUTHORS_SWIN_RULES
    wanted = swin_shapes(config)
    # A classifier has no norms on its middle stages: they start as the detector's do, and learn there.
    new = {}
    for number in (1, 2, 3):
        for kind, fill in (("scale", 1.0), ("bias", 0.0)):
            path = f"norm{number}/{kind}"
            [(name, _, _)] = rules.names(path)
            if name not in state:
                new[name] = np.full(wanted[path], fill, np.float32)
    if new:
        notes += (f"new, as the source has none: norms of the stages' outputs, ones and zeros ({some(new)})",)
    converted = Converted("swin", asdict(config), rules.to_ours(state | new, wanted))
    return _conversion(converted, rules, state, notes)


def t5_shapes(config: T5Config, width: int) -> dict[str, Shape]:
    """Without LoRA, which a pre-trained T5 does not have."""

    def everything(model: T5):
        tokens = jnp.ones((1, 1), jnp.int32)
        memory = model.encode(jnp.ones((1, 1, width)))
        return model.head(model.decode(tokens, memory, tokens > 0))

    model = T5(config, width, lora=False, dtype=jnp.dtype("float32"))
    return shapes_of(jax.eval_shape(lambda key: model.init(key, method=everything), jax.random.key(0))["params"])


def _t5(source: Mapping[str, np.ndarray], described: Mapping[str, Any], notes: tuple[str, ...]) -> Conversion:
    state = dict(source)
    tied = described.get("tie_word_embeddings", True) is not False
    if described and tied and "lm_head.weight" in state and not any(f"{name}.weight" in state for name in EMBEDDINGS):
        state["shared.weight"] = state["lm_head.weight"]  # one matrix, saved under its last name
    config, width = t5_sizes(_shapes(state), described)
    embedding = next(state[f"{name}.weight"] for name in EMBEDDINGS if f"{name}.weight" in state)
    head = state.get("lm_head.weight")
    shared = head is None or np.array_equal(head, embedding)
    factor, reason = _head_factor(described, config.gated, width, head is not None)
    if shared:
        state["lm_head.weight"] = embedding * np.float32(factor)
        notes += (f"the head is the embedding times {factor:.4g}: {reason}",)
    params = T5_RULES.to_ours(state, t5_shapes(config, width))
    if shared and not reason:
        raise WeightsError("it has no lm_head.weight, and no config.json beside it says how its embedding is the head")
    if not shared and described and tied and described.get("scale_decoder_outputs", True):
        raise WeightsError(
            "config.json has head and embedding as one matrix (tie_word_embeddings is not false), but lm_head.weight "
            "and shared.weight differ: mend the config.json beside the weights"
        )
    converted = Converted("t5", {**asdict(config), "text_width": width}, params)
    return _conversion(converted, T5_RULES, source, notes)


def _head_factor(described: Mapping[str, Any], gated: bool, width: int, listed: bool) -> tuple[float, str]:
    """What the embedding is multiplied by to be the head, and how that is known.

    The first T5 scales what enters the head by d^-½, here part of the head; later ones do not. `listed`: the file has
    the matrix under the head's name too. Empty words where nothing tells which it is.
    """
    if described:
        scaled = described.get("scale_decoder_outputs", described.get("tie_word_embeddings", True) is not False)
        return (width**-0.5 if scaled else 1.0), "as config.json says"
    if not gated:
        return width**-0.5, "as in the first T5 (there is no config.json beside the weights)"
    if listed:
        return 1.0, "as in T5 1.1 and Flan-T5 (there is no config.json beside the weights)"
    return 1.0, ""


def _clip(state: Mapping[str, np.ndarray], described: Mapping[str, Any], notes: tuple[str, ...]) -> Conversion:
    config = clip_sizes(_shapes(state), described)
    wanted = shapes_of(clip_text_shapes(config))
    return _conversion(Converted("clip", asdict(config), CLIP_RULES.to_ours(state, wanted)), CLIP_RULES, state, notes)


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
