"""Hugging Face's CLIPTextModelWithProjection, alone or inside a whole CLIPModel ↔ the tree of model/clip_text.py."""

from opendet_jax.weights.layers import dense, norm
from opendet_jax.weights.rules import LINEAR, Rule, Rules

_LAYER, _OURS = "text_model.encoder.layers.{i}", "layers_{i}"

TEXT_RULES = (
    Rule("text_model.embeddings.token_embedding.weight", "token_embedding/embedding"),
    Rule("text_model.embeddings.position_embedding.weight", "position_embedding"),
    *(rule for n in "qkv" for rule in dense(f"{_LAYER}.self_attn.{n}_proj", f"{_OURS}/{n}_proj")),
    *dense(f"{_LAYER}.self_attn.out_proj", f"{_OURS}/out_proj"),
    *(rule for n in (1, 2) for rule in norm(f"{_LAYER}.layer_norm{n}", f"{_OURS}/layer_norm{n}")),
    *(rule for n in (1, 2) for rule in dense(f"{_LAYER}.mlp.fc{n}", f"{_OURS}/fc{n}")),
    *norm("text_model.final_layer_norm", "final_layer_norm"),
    Rule("text_projection.weight", "text_projection/kernel", LINEAR),
    Rule("text_model.embeddings.position_ids", None),  # computed
)

_VISION = "vision_model.encoder.layers.{i}"
_VISION_NAMES = (
    "vision_model.embeddings.class_embedding",
    "vision_model.embeddings.patch_embedding.weight",
    "vision_model.embeddings.position_embedding.weight",
    "vision_model.embeddings.position_ids",
    *(f"vision_model.{n}.{kind}" for n in ("pre_layrnorm", "post_layernorm") for kind in ("weight", "bias")),
    *(f"{_VISION}.self_attn.{n}_proj.{kind}" for n in ("q", "k", "v", "out") for kind in ("weight", "bias")),
    *(f"{_VISION}.layer_norm{n}.{kind}" for n in (1, 2) for kind in ("weight", "bias")),
    *(f"{_VISION}.mlp.fc{n}.{kind}" for n in (1, 2) for kind in ("weight", "bias")),
    "visual_projection.weight",
    "logit_scale",
)

HUGGING_FACE = Rules((*TEXT_RULES, *(Rule(name, None) for name in _VISION_NAMES)))
