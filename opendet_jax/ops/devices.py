"""Work that every device does for itself, on its own images.

XLA splits most operations over devices by itself. It cannot split a kernel (for TPUs it refuses, for GPUs it gathers
everything everywhere without a word), and a loop that runs until every image is done would wait for all devices.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec

BATCH_AXES = ("data", "fsdp")  # the mesh axes over which images are split


def on_each_device(
    function: Callable[..., Any], *arrays: Any, shared: Sequence[Any] = (), xla_splits_rest: bool = False
) -> Any:
    """`function(*shared, *arrays)`, where `arrays` and the results begin with the axis of images; trees of them, too.

    Under `jax.set_mesh` of a mesh with axes "data" or "fsdp" (of type Auto), every device calls it with its own images
    and all of `shared`, and nothing is communicated but, going back, the sum of the gradients of `shared`. Over the
    other axes of the mesh all devices do the same, or, with `xla_splits_rest`, what XLA thinks best. Images that do not
    divide evenly among the devices are computed on all of them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    automatic = {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto}
    axes = tuple(axis for axis in BATCH_AXES if axis in automatic)
    count = math.prod(mesh.shape[axis] for axis in axes)
    # No mesh, or inside a shard_map over it; or XLA splits all there is to split, which axes of one device confuse.
    if not axes or (count == 1 and xla_splits_rest):
        return function(*shared, *arrays)
    even = all(leaf.shape[0] % count == 0 for leaf in jax.tree.leaves(arrays))
    split, whole = PartitionSpec(axes if even else None), PartitionSpec()
    return jax.shard_map(
        function,
        in_specs=(*[whole] * len(shared), *[split] * len(arrays)),
        out_specs=split,
        axis_names=set(axes) if xla_splits_rest else automatic,
        check_vma=False,
    )(*shared, *arrays)
