"""Swin in the authors' checkpoints → the tree of model/swin.py."""

from opendet_jax.weights.layers import convolution, dense, norm
from opendet_jax.weights.rules import Rule, linear


def swin_rules(source: str, target: str) -> tuple[Rule, ...]:
    """`source`: pattern before the first name, its last dot included; `target`: path of the backbone."""
    block, path = rf"{source}layers\.(\d+)\.blocks\.(\d+)", rf"{target}/layers_\1/blocks_\2"
    return (
        *convolution(rf"{source}patch_embed\.proj", f"{target}/patch_embed/proj"),
        *norm(rf"{source}patch_embed\.norm", f"{target}/patch_embed/norm"),
        *norm(rf"{block}\.norm([12])", rf"{path}/norm\3"),
        *dense(rf"{block}\.attn\.(qkv|proj)", rf"{path}/attn/\3"),
        Rule(rf"{block}\.attn\.relative_position_bias_table", f"{path}/attn/relative_position_bias_table"),
        Rule(rf"{block}\.attn\.relative_position_index", None),  # computed, not learned
        *dense(rf"{block}\.mlp\.(fc[12])", rf"{path}/mlp/\3"),
        *norm(rf"{source}layers\.(\d+)\.downsample\.norm", rf"{target}/layers_\1/downsample/norm"),
        Rule(
            rf"{source}layers\.(\d+)\.downsample\.reduction\.weight",
            rf"{target}/layers_\1/downsample/reduction/kernel",
            linear,
        ),
        *norm(rf"{source}norm([123])", rf"{target}/norm\1"),
    )


SWIN_RULES = swin_rules(r"detr\.detr\.backbone\.0\.", "backbone")
