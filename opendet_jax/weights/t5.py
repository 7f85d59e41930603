"""Names of Hugging Face's T5 ↔ our tree, which follows them: only separators and the layouts of matrices change."""

from collections.abc import Sequence

from opendet_jax.weights.rules import LINEAR, Rule, Rules

EMBEDDINGS = ("shared", "encoder.embed_tokens", "decoder.embed_tokens")  # one matrix
FEED_FORWARD = ("wi", "wi_0", "wi_1", "wo")


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
    for name in embeddings:
        rules += [
            Rule(f"{prefix}{name}.weight", f"{path}shared/embedding"),
            Rule(f"{prefix}{name}.lora_A", f"{path}shared/lora_A", LINEAR),
            Rule(f"{prefix}{name}.lora_B", f"{path}shared/lora_B", LINEAR),
        ]
    return tuple(rules)


HUGGING_FACE = Rules(t5_rules("", ""))
