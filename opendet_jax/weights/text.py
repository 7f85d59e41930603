"""Hugging Face's T5 and CLIP text tower ↔ our trees, which follow their names: only separators and the layouts of
matrices change.
"""

from collections.abc import Sequence

from opendet_jax.weights.rules import LINEAR, Rule, Rules, dead, dense, norm

EMBEDDINGS = ("shared", "encoder.embed_tokens", "decoder.embed_tokens")  # one matrix
FEED_FORWARD = ("wi", "wi_0", "wi_1", "wo")
DEAD = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
COMPUTED = "computed, not learned"


def t5_rules(prefix: str, path: str, embeddings: Sequence[str] = EMBEDDINGS) -> tuple[Rule, ...]:
    """Rules for the names `prefix` + Hugging Face's and the paths `path` + ours; LoRA and head bias included.

    `embeddings`: the names under which a checkpoint lists the one token embedding.
    """
    rules: list[Rule] = []
    for stack, kinds in (("encoder", ("SelfAttention",)), ("decoder", ("SelfAttention", "EncDecAttention"))):
        block, ours = f"{prefix}{stack}.block.{{i}}.layer", f"{path}{stack}/block_{{i}}"
        for layer, kind in enumerate(kinds):
            rules += [
                Rule(f"{block}.{layer}.{kind}.{n}.weight", f"{ours}/layer_{layer}/{kind}/{n}/kernel", LINEAR)
                for n in "qkvo"
            ]
        last = len(kinds)
        rules += [
            Rule(f"{block}.{last}.DenseReluDense.{n}.weight", f"{ours}/layer_{last}/DenseReluDense/{n}/kernel", LINEAR)
            for n in FEED_FORWARD
        ]
        bias = "SelfAttention.relative_attention_bias"
        rules += [
            Rule(f"{block}.0.{bias}.weight", f"{ours}/layer_0/{bias.replace('.', '/')}/embedding"),
            Rule(f"{block}.{{j}}.layer_norm.weight", f"{ours}/layer_{{j}}/layer_norm/scale"),
            Rule(f"{prefix}{stack}.final_layer_norm.weight", f"{path}{stack}/final_layer_norm/scale"),
        ]
    rules += [
        Rule(f"{prefix}lm_head.weight", f"{path}lm_head/kernel", LINEAR),
        Rule(f"{prefix}lm_head.bias", f"{path}lm_head/bias"),
        Rule(f"{prefix}lm_head.lora_A", f"{path}lm_head/lora_A", LINEAR),
        Rule(f"{prefix}lm_head.lora_B", f"{path}lm_head/lora_B", LINEAR),
    ]
    # The first T5's files have it; no layer reads it.
    rules += dead("an old file's tensor that T5 never had a use for", (f"{prefix}{DEAD}",))
    for name in embeddings:
        rules += [
            Rule(f"{prefix}{name}.weight", f"{path}shared/embedding"),
            Rule(f"{prefix}{name}.lora_A", f"{path}shared/lora_A", LINEAR),
            Rule(f"{prefix}{name}.lora_B", f"{path}shared/lora_B", LINEAR),
        ]
    return tuple(rules)


# GenerateU's T5 has it, for a loss that its program never asks for.
T5_RULES = Rules((*t5_rules("", ""), *dead("a temperature that GenerateU keeps and never uses", ("temp",))))


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
    *dead(COMPUTED, ("text_model.embeddings.position_ids",)),
)

_VISION = "vision_model.encoder.layers.{i}"
_VISION_NAMES = (
    "vision_model.embeddings.class_embedding",
    "vision_model.embeddings.patch_embedding.weight",
    "vision_model.embeddings.position_embedding.weight",
    *(f"vision_model.{n}.{kind}" for n in ("pre_layrnorm", "post_layernorm") for kind in ("weight", "bias")),
    *(f"{_VISION}.self_attn.{n}_proj.{kind}" for n in ("q", "k", "v", "out") for kind in ("weight", "bias")),
    *(f"{_VISION}.layer_norm{n}.{kind}" for n in (1, 2) for kind in ("weight", "bias")),
    *(f"{_VISION}.mlp.fc{n}.{kind}" for n in (1, 2) for kind in ("weight", "bias")),
    "visual_projection.weight",
)

CLIP_RULES = Rules(
    (
        *TEXT_RULES,
        *dead("CLIP's image tower", _VISION_NAMES),
        *dead(COMPUTED, ("vision_model.embeddings.position_ids",)),
        *dead("the factor of CLIP's similarities", ("logit_scale",)),
    )
)
