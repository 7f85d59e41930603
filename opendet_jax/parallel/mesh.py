"""The devices of a run as one mesh of three axes: data × fsdp × tensor."""

import math
from collections.abc import Callable, Sequence
from dataclasses import astuple
from functools import cache
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from opendet_jax.config import Config, MeshConfig
from opendet_jax.errors import InputError
from opendet_jax.ops.devices import BATCH_AXES

AXES = ("data", "fsdp", "tensor")


class MeshError(InputError):
    """Sizes of a mesh that do not fit the devices, the processes or the batch."""


def mesh_sizes(config: MeshConfig, devices: int) -> tuple[int, int, int]:
    """Those of the three axes, with −1 replaced by what is left of the devices. Raises MeshError."""
    sizes = astuple(config)[: len(AXES)]
    given = math.prod(size for size in sizes if size != -1)
    if given > devices or devices % given or (-1 not in sizes and given != devices):
        shape = " × ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes, strict=True))
        raise MeshError(f"config.mesh = {shape}: does not make {devices} devices")
    data, fsdp, tensor = (devices // given if size == -1 else size for size in sizes)
    return data, fsdp, tensor


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over all devices (or those given), laid out so that neighbours on an axis are near each other.

    Raises:
      MeshError: the sizes do not make the number of devices, or a group of `tensor` has devices of several processes.
    """
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(config, len(devices))
    mesh = jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)
    for group in mesh.devices.reshape(-1, sizes[-1]):
        if len({device.process_index for device in group}) > 1:
            # Each process reads the pictures of its own devices alone, and the devices of a group share theirs.
            raise MeshError(
                f"config.mesh.tensor = {sizes[-1]}: its devices must be of one process, which has "
                f"{len(devices) // jax.process_count()}"
            )
    return mesh


def local_mesh() -> Mesh:
    """This process's devices in a row, for work that each process does on its own."""
    return Mesh(np.array(jax.local_devices()), BATCH_AXES[:1])


def batch_shards(mesh: Mesh | AbstractMesh) -> int:
    """How many parts a batch is split into."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def check_batch(config: Config, mesh: Mesh | AbstractMesh) -> None:
    """Raises MeshError where the images of a step cannot be shared evenly."""
    shards, parts = batch_shards(mesh), config.train.accumulate
    if config.data.batch_size % (shards * parts):
        cut = f" in {parts} parts" if parts > 1 else ""
        raise MeshError(
            f"config.data.batch_size = {config.data.batch_size}: must be a multiple of {shards * parts}, to be split"
            f"{cut} over the {shards} shares of mesh data {mesh.shape['data']} × fsdp {mesh.shape['fsdp']}"
        )


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def by_example(mesh: Mesh) -> NamedSharding:
    """The first axis of every array of a batch is split over the devices."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def describe_mesh(config: Config, mesh: Mesh) -> str:
    """The devices, and what each has of a step's images, in a line."""
    size, parts, shards = config.data.batch_size, config.train.accumulate, batch_shards(mesh)
    kind = mesh.devices.flat[0].device_kind
    processes = len({device.process_index for device in mesh.devices.flat})
    axes = " × ".join(f"{axis} {mesh.shape[axis]}" for axis in AXES)
    share = f"{shards} × {size // shards // parts} images" + (
        f" × {parts} parts one after the other" if parts > 1 else ""
    )
    return f"{mesh.size} × {kind} of {processes} process(es), mesh {axes}; a batch of {size} = {share}"


def local_copy(params: Any, mesh: Mesh) -> Any:
    """The parameters, whole, on this process's first device. Every process calls this."""
    return jax.tree.map(lambda x: x.addressable_data(0), _gather(mesh)(params))


@cache
def _gather(mesh: Mesh) -> Callable[[Any], Any]:
    """One function for a mesh: a new one would be compiled, and kept, each time."""
    return jax.jit(lambda tree: tree, out_shardings=replicated(mesh))


def own_rows(mesh: Mesh, size: int) -> list[int]:
    """The rows of a batch of `size` images that lie on this process's devices, rising.

    They need not follow each other: on TPUs a mesh goes along the links, which cross the hosts back and forth.
    """
    places = by_example(mesh).addressable_devices_indices_map((size,)).values()
    return sorted({row for place in places if place for row in range(size)[place[0]]})


def place_batch(batch: Any, mesh: Mesh) -> Any:
    """The global batch, of numpy arrays of which each process has its `own_rows`."""
    sharding = by_example(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch)
