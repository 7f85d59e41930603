"""Rules of whole layers: what PyTorch calls weight and bias, Flax calls kernel or scale and bias.

`name` and `path` are templates without the last dot or slash.
"""

from opendet_jax.weights.rules import CONV, LINEAR, Rule


def dense(name: str, path: str) -> tuple[Rule, ...]:
    return Rule(f"{name}.weight", f"{path}/kernel", LINEAR), Rule(f"{name}.bias", f"{path}/bias")


def convolution(name: str, path: str) -> tuple[Rule, ...]:
    return Rule(f"{name}.weight", f"{path}/kernel", CONV), Rule(f"{name}.bias", f"{path}/bias")


def norm(name: str, path: str) -> tuple[Rule, ...]:
    return Rule(f"{name}.weight", f"{path}/scale"), Rule(f"{name}.bias", f"{path}/bias")


def self_attention(name: str, path: str) -> tuple[Rule, ...]:
    """Query, key and value projections are packed, in this order, into one."""
    return (
        Rule(f"{name}.in_proj_weight", f"{path}/in_proj/kernel", LINEAR),
        Rule(f"{name}.in_proj_bias", f"{path}/in_proj/bias"),
        *dense(f"{name}.out_proj", f"{path}/out_proj"),
    )


def deformable_attention(name: str, path: str) -> tuple[Rule, ...]:
    parts = ("value_proj", "sampling_offsets", "attention_weights", "output_proj")
    return tuple(rule for part in parts for rule in dense(f"{name}.{part}", f"{path}/{part}"))
