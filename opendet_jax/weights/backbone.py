"""Swin in the authors' checkpoints and in Hugging Face's ↔ the tree of model/swin.py."""

from opendet_jax.weights.rules import LINEAR, Part, Rule, Rules, convolution, dense, norm


def authors_rules(prefix: str, path: str) -> tuple[Rule, ...]:
    """`prefix`: what stands before the first name, its last dot included; `path`: of the backbone, likewise."""
    block, ours = f"{prefix}layers.{{i}}.blocks.{{j}}", f"{path}layers_{{i}}/blocks_{{j}}"
    merging, ours_merging = f"{prefix}layers.{{i}}.downsample", f"{path}layers_{{i}}/downsample"
    return (
        *convolution(f"{prefix}patch_embed.proj", f"{path}patch_embed/proj"),
        *norm(f"{prefix}patch_embed.norm", f"{path}patch_embed/norm"),
        *(rule for n in (1, 2) for rule in norm(f"{block}.norm{n}", f"{ours}/norm{n}")),
        *(rule for n in ("qkv", "proj") for rule in dense(f"{block}.attn.{n}", f"{ours}/attn/{n}")),
        Rule(f"{block}.attn.relative_position_bias_table", f"{ours}/attn/relative_position_bias_table"),
        *(rule for n in ("fc1", "fc2") for rule in dense(f"{block}.mlp.{n}", f"{ours}/mlp/{n}")),
        *norm(f"{merging}.norm", f"{ours_merging}/norm"),
        Rule(f"{merging}.reduction.weight", f"{ours_merging}/reduction/kernel", LINEAR),
        *(rule for n in (1, 2, 3) for rule in norm(f"{prefix}norm{n}", f"{path}norm{n}")),
        # computed, not learned
        Rule(f"{block}.attn.relative_position_index", None),
        Rule(f"{block}.attn_mask", None),
    )


# The classifier that the backbone was trained as.
CLASSIFIER = (Rule("norm.weight", None), Rule("norm.bias", None), Rule("head.weight", None), Rule("head.bias", None))
AUTHORS_SWIN_RULES = Rules((*authors_rules("", ""), *CLASSIFIER))


def _hugging_face(prefix: str) -> tuple[Rule, ...]:
    embeddings = f"{prefix}embeddings"
    block, ours = f"{prefix}encoder.layers.{{i}}.blocks.{{j}}", "layers_{i}/blocks_{j}"
    merging, ours_merging = f"{prefix}encoder.layers.{{i}}.downsample", "layers_{i}/downsample"
    packed = []
    for number, projection in enumerate(("query", "key", "value")):
        name, part = f"{block}.attention.self.{projection}", Part(number, 3)
        packed += [
            Rule(f"{name}.weight", f"{ours}/attn/qkv/kernel", LINEAR, part),
            Rule(f"{name}.bias", f"{ours}/attn/qkv/bias", part=part),
        ]
    return (
        *convolution(f"{embeddings}.patch_embeddings.projection", "patch_embed/proj"),
        *norm(f"{embeddings}.norm", "patch_embed/norm"),
        *packed,
        *dense(f"{block}.attention.output.dense", f"{ours}/attn/proj"),
        Rule(f"{block}.attention.self.relative_position_bias_table", f"{ours}/attn/relative_position_bias_table"),
        *norm(f"{block}.layernorm_before", f"{ours}/norm1"),
        *norm(f"{block}.layernorm_after", f"{ours}/norm2"),
        *dense(f"{block}.intermediate.dense", f"{ours}/mlp/fc1"),
        *dense(f"{block}.output.dense", f"{ours}/mlp/fc2"),
        *norm(f"{merging}.norm", f"{ours_merging}/norm"),
        Rule(f"{merging}.reduction.weight", f"{ours_merging}/reduction/kernel", LINEAR),
        Rule(f"{block}.attention.self.relative_position_index", None),
        # the whole model's last norm, which pooling and classifying see
        Rule(f"{prefix}layernorm.weight", None),
        Rule(f"{prefix}layernorm.bias", None),
    )


def hugging_face_rules(prefix: str) -> Rules:
    """`prefix`: "" for SwinModel and SwinBackbone, "swin." for a whole classifier."""
    return Rules(
        (
            *_hugging_face(prefix),
            *(rule for n in (1, 2, 3) for rule in norm(f"hidden_states_norms.stage{n + 1}", f"norm{n}")),
            *(Rule(f"{last}.{kind}", None) for last in ("swin.layernorm", "classifier") for kind in ("weight", "bias")),
        )
    )


SWIN_RULES = hugging_face_rules("")
