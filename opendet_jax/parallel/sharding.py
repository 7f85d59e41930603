"""Where each parameter lies: one table of rules over parameter paths, which optimizer state and averages follow.

`tensor` splits the large matrix products themselves: of a feed-forward layer each device has some of the hidden
neurons, of the language model's head and embedding some of the words. `fsdp` splits what is stored: before a step
computes, the parts are gathered; their gradients come back summed, each device updating its own part.
"""

import re
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

# (pattern of a whole path, mesh axis of each dimension). The first that fits counts; what none fits is not split.
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    # T5: words over tensor
    (r"name_generator/t5/shared/embedding", ("tensor", "fsdp")),  # V × E
    (r"name_generator/t5/shared/lora_A", ("tensor", None)),  # V × rank
    (r"name_generator/t5/lm_head/kernel", ("fsdp", "tensor")),  # E × V
    (r"name_generator/t5/lm_head/lora_B", (None, "tensor")),  # rank × V
    (r"name_generator/t5/lm_head/bias", ("tensor",)),
    # T5: hidden neurons over tensor
    (r"name_generator/t5/.*/wi(_\d)?/kernel", ("fsdp", "tensor")),
    (r"name_generator/t5/.*/wo/kernel", ("tensor", "fsdp")),
    (r"name_generator/t5/.*Attention/[qkvo]/kernel", ("fsdp", None)),
    # Swin: all but the small first stage
    (r"backbone/layers_[123]/.*/fc1/kernel", ("fsdp", "tensor")),
    (r"backbone/layers_[123]/.*/fc1/bias", ("tensor",)),
    (r"backbone/layers_[123]/.*/fc2/kernel", ("tensor", "fsdp")),
    (r"backbone/layers_[123]/.*/(qkv|proj|reduction)/kernel", ("fsdp", None)),
    (r"neck/projections_3/kernel", (None, None, "fsdp", None)),  # 3 × 3 × C × D
    # Encoder, decoder, aligners, distiller: feed-forward layers
    (r".*/linear1/kernel", ("fsdp", "tensor")),
    (r".*/linear1/bias", ("tensor",)),
    (r".*/linear2/kernel", ("tensor", "fsdp")),
    # Distiller: φ, of which the first two layers are a pair, and the fusion
    (r"distiller/phi(_\w+)?/layers_0/kernel", ("fsdp", "tensor")),
    (r"distiller/phi(_\w+)?/layers_0/bias", ("tensor",)),
    (r"distiller/phi(_\w+)?/layers_1/kernel", ("tensor", "fsdp")),
    (r"distiller/phi(_\w+)?/layers_2/kernel", ("fsdp", None)),
    (r"distiller/phi(_\w+)?/linear(_gating)?/kernel", ("fsdp", None)),
    (r"distiller/fusion/kernel", ("fsdp", None)),
)


def rule_of(path: str) -> PartitionSpec:
    """The mesh axes of a parameter's dimensions, by the table."""
    return next((PartitionSpec(*axes) for pattern, axes in RULES if re.fullmatch(pattern, path)), PartitionSpec())


def path_of(keys: Sequence[Any]) -> str:
    """The parameter a leaf of a state belongs to: in parameters, moments and averages the path ends with its name.

    Empty for counters and the like.
    """
    names = []
    for key in reversed(keys):
        if not isinstance(key, jax.tree_util.DictKey):
            break
        names.append(str(key.key))
    return "/".join(reversed(names))


def partition(tree: Any, mesh: Mesh | AbstractMesh, leave_out: Sequence[str] = ()) -> Any:
    """The sharding of each leaf of parameters, of an optimizer's state or of a whole TrainState.

    An axis that does not divide its dimension evenly is dropped, as are those of `leave_out`.
    """

    def sharding(keys, leaf) -> NamedSharding:
        kept = [
            axis if axis and axis not in leave_out and size % mesh.shape[axis] == 0 else None
            for axis, size in zip_longest(rule_of(path_of(keys)), leaf.shape)
        ]
        return NamedSharding(mesh, PartitionSpec(*kept))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def stored(tree: Any) -> Any:
    """Inside a step under `jax.set_mesh`: parameters or gradients as they are stored, in parts."""
    mesh = jax.sharding.get_abstract_mesh()
    return tree if mesh.empty else jax.lax.with_sharding_constraint(tree, partition(tree, mesh))


def gathered(params: Any) -> Any:
    """Inside a step under `jax.set_mesh`: the parameters as it computes with them, whole but for the axis `tensor`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return params
    return jax.lax.with_sharding_constraint(params, partition(params, mesh, leave_out=["fsdp"]))
