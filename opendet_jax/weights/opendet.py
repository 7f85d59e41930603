"""All names of the authors' checkpoints ↔ the tree of model/opendet.py."""

from collections.abc import Iterator

from opendet_jax.weights.detector import DETECTOR_RULES
from opendet_jax.weights.layers import dense
from opendet_jax.weights.rules import Rule, Rules
from opendet_jax.weights.swin import authors_rules
from opendet_jax.weights.t5 import t5_rules

GENERATOR = "detr.detr.class_generate"
CLIP = "clip_model"


def _dead_generator() -> Iterator[Rule]:
    """Left over in the program: no output depends on them."""
    rules = (
        *dense(f"{GENERATOR}.t5_model.feed_hide_state.linear1", ""),
        *dense(f"{GENERATOR}.t5_model.feed_hide_state.linear2", ""),
        *dense(f"{GENERATOR}.t5_proj", ""),
        Rule(f"{GENERATOR}.t5_model.temp", None),
    )
    yield from (Rule(rule.name, None) for rule in rules)


def _clip() -> Iterator[Rule]:
    """The frozen text encoder with its image tower, kept in the same file in OpenAI's layout: no part of the model."""
    for tower in (f"{CLIP}.transformer", f"{CLIP}.visual.transformer"):
        block = f"{tower}.resblocks.{{i}}"
        for name in ("attn.in_proj_weight", "attn.in_proj_bias"):
            yield Rule(f"{block}.{name}", None)
        for name in ("attn.out_proj", "ln_1", "ln_2", "mlp.c_fc", "mlp.c_proj"):
            yield Rule(f"{block}.{name}.weight", None)
            yield Rule(f"{block}.{name}.bias", None)
    for name in ("ln_final", "visual.ln_pre", "visual.ln_post"):
        yield Rule(f"{CLIP}.{name}.weight", None)
        yield Rule(f"{CLIP}.{name}.bias", None)
    for name in ("token_embedding.weight", "positional_embedding", "text_projection", "logit_scale"):
        yield Rule(f"{CLIP}.{name}", None)
    for name in ("conv1.weight", "class_embedding", "positional_embedding", "proj"):
        yield Rule(f"{CLIP}.visual.{name}", None)


OPENDET_RULES = Rules(
    (
        *authors_rules("detr.detr.backbone.0.", "backbone/"),
        *DETECTOR_RULES,
        *t5_rules(f"{GENERATOR}.t5_model.", "name_generator/t5/", ("shared", "decoder.embed_tokens")),
        *_dead_generator(),
        *_clip(),
    )
)
