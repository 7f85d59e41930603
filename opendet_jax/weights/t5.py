"""Names of Hugging Face's T5 → our tree, which follows them: only separators and the layouts of matrices change."""

import re

from opendet_jax.weights.rules import Rule, linear

DENSE = r"(?:q|k|v|o|wi|wi_0|wi_1|wo)"


def t5_rules(source_prefix: str, target_prefix: str) -> tuple[Rule, ...]:
    """Rules for the names `source_prefix` + Hugging Face's, to `target_prefix` + ours; LoRA and head bias included."""
    source, to = re.escape(source_prefix), target_prefix
    layer = source + r"(encoder|decoder)\.block\.(\d+)\.layer\.(\d+)\."
    inside = to + r"\1/block_\2/layer_\3/"
    return (
        Rule(layer + rf"(\w+)\.({DENSE})\.weight", inside + r"\4/\5/kernel", linear),
        Rule(
            layer + r"SelfAttention\.relative_attention_bias\.weight",
            inside + "SelfAttention/relative_attention_bias/embedding",
        ),
        Rule(layer + r"layer_norm\.weight", inside + "layer_norm/scale"),
        Rule(source + r"(encoder|decoder)\.final_layer_norm\.weight", to + r"\1/final_layer_norm/scale"),
        Rule(source + r"shared\.weight", to + "shared/embedding"),
        Rule(source + r"lm_head\.weight", to + "lm_head/kernel", linear),
        Rule(source + r"lm_head\.bias", to + "lm_head/bias"),
        Rule(source + r"(shared|lm_head)\.(lora_[AB])", to + r"\1/\2", linear),
        Rule(source + r"(encoder|decoder)\.embed_tokens\..+", None),  # `shared` once more
    )


AUTHORS = "detr.detr.class_generate."

T5_RULES = (
    *t5_rules(AUTHORS + "t5_model.", "name_generator/t5/"),
    # Left over in the authors' program: no output depends on them.
    Rule(re.escape(AUTHORS) + r"(t5_model\.feed_hide_state\..+|t5_model\.temp|t5_proj\..+)", None),
)
