"""Rules of whole layers: what PyTorch calls weight and bias, Flax calls kernel or scale and bias.

`source` is the start of a pattern (a regular expression whose groups `target` may use), without the last dot.
"""

from opendet_jax.weights.rules import Rule, conv, linear


def dense(source: str, target: str) -> tuple[Rule, ...]:
    return (
        Rule(rf"{source}\.weight", f"{target}/kernel", linear),
        Rule(rf"{source}\.bias", f"{target}/bias"),
    )


def convolution(source: str, target: str) -> tuple[Rule, ...]:
    return Rule(rf"{source}\.weight", f"{target}/kernel", conv), Rule(rf"{source}\.bias", f"{target}/bias")


def norm(source: str, target: str) -> tuple[Rule, ...]:
    return Rule(rf"{source}\.weight", f"{target}/scale"), Rule(rf"{source}\.bias", f"{target}/bias")


def self_attention(source: str, target: str) -> tuple[Rule, ...]:
    """Query, key and value projections are packed, in this order, into one."""
    return (
        Rule(rf"{source}\.in_proj_weight", f"{target}/in_proj/kernel", linear),
        Rule(rf"{source}\.in_proj_bias", f"{target}/in_proj/bias"),
        *dense(rf"{source}\.out_proj", f"{target}/out_proj"),
    )


def deformable_attention(source: str, target: str) -> tuple[Rule, ...]:
    parts = ("value_proj", "sampling_offsets", "attention_weights", "output_proj")
    return tuple(rule for part in parts for rule in dense(rf"{source}\.{part}", f"{target}/{part}"))
