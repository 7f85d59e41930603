"""The mesh and the table of rules; test_on_meshes.py takes steps on real (forced) devices."""

import re
from dataclasses import replace
from pathlib import Path

import jax
import jaxtyping
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from opendet_jax.config import Config, ConfigError, MeshConfig
from opendet_jax.config_files import parse_config
from opendet_jax.model.opendet import OpenDet
from opendet_jax.parallel.mesh import AXES, MeshError, check_batch, describe_mesh, make_mesh, mesh_sizes
from opendet_jax.parallel.sharding import RULES, partition, path_of, rule_of
from opendet_jax.train.optimizer import abstract_state, describe_rates, make_optimizer

GOLDEN = Path(__file__).parents[1] / "golden"


def abstract_mesh(*sizes: int) -> AbstractMesh:
    return AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def paths(name: str) -> dict[str, tuple[int, ...]]:
    """Shapes of a config's parameters, by path."""
    lines = (line.split("  ") for line in (GOLDEN / f"{name}.txt").read_text().splitlines() if line[0] != "#")
    return {path: tuple(int(size) for size in shape.split("×") if size) for path, shape, *_ in lines}


@pytest.fixture(scope="module")
def state():
    """Shapes of the default config's whole state, with a moving average."""
    jaxtyping.config.update("jaxtyping_disable", True)  # shapes pass through dataclasses of arrays
    config = replace(Config(), train=replace(Config().train, ema=0.999))
    optimizer = make_optimizer(config.optimizer, config.ablation)
    yield abstract_state(OpenDet(config.model), optimizer, config, make_mesh(MeshConfig()))
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize(
    ("sizes", "devices", "wanted"),
    [((-1, 1, 1), 8, (8, 1, 1)), ((2, -1, 2), 8, (2, 2, 2)), ((1, 2, -1), 8, (1, 2, 4)), ((2, 2, 1), 4, (2, 2, 1))],
)
def test_minus_one_is_what_is_left(sizes, devices, wanted):
    assert mesh_sizes(MeshConfig(*sizes), devices) == wanted


@pytest.mark.parametrize(("sizes", "devices"), [((-1, 3, 1), 8), ((2, 2, 1), 8), ((4, 4, 1), 8), ((-1, 16, 1), 8)])
def test_sizes_that_do_not_make_the_devices_are_refused(sizes, devices):
    with pytest.raises(MeshError, match=r"config.mesh = data -?\d+ × fsdp \d+ × tensor 1: does not make 8 devices"):
        mesh_sizes(MeshConfig(*sizes), devices)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("data", 0, "mesh.data = 0: must be a number of devices, or −1"),
        ("fsdp", -1, r"mesh = \(-1, -1, 1\): must be of sizes of which one at most is −1"),
        ("processes", -1, "mesh.processes = -1: must be a number"),
        ("processes", 2, "mesh.coordinator = '': must be host:port"),
    ],
)
def test_bad_mesh_fields_are_named(field, value, message):
    with pytest.raises(ConfigError, match=message):
        parse_config({"mesh": {field: value}})


def test_a_process_number_beyond_their_count_is_refused():
    with pytest.raises(ConfigError, match=r"mesh\.process = 2: must be this process's number, 0 … 1"):
        parse_config({"mesh": {"processes": 2, "process": 2, "coordinator": "a:1"}})


def test_a_batch_that_cannot_be_shared_is_refused():
    config = parse_config({"data": {"batch_size": 12}, "train": {"accumulate": 2}})
    check_batch(config, abstract_mesh(3, 2, 4))
    with pytest.raises(MeshError, match="batch_size = 12: must be a multiple of 16, to be split in 2 parts over the 8"):
        check_batch(config, abstract_mesh(4, 2, 1))


def test_what_is_said_at_the_start():
    config = parse_config({"data": {"batch_size": 8}, "train": {"accumulate": 2}})
    said = describe_mesh(config, make_mesh(config.mesh))
    assert said.endswith(
        "of 1 process(es), mesh data 1 × fsdp 1 × tensor 1; a batch of 8 = 1 × 4 images × 2 parts one after the other"
    )
    assert describe_rates(config.optimizer) == (
        "learning rates detector 0.0001, backbone 1e-05, generator 0.0002, a tenth from step 250,000 on"
    )


@pytest.mark.parametrize("name", ["swin_t", "swin_s", "swin_l"])
def test_every_rule_has_parameters_that_it_divides(name):
    shapes = paths(name)
    for pattern, axes in RULES:
        if pattern.endswith("lm_head/bias"):
            continue  # only in the authors' checkpoints
        found = [
            shape for path, shape in shapes.items() if re.fullmatch(pattern, path) and tuple(rule_of(path)) == axes
        ]
        assert found, f"{pattern} fits nothing that an earlier rule leaves"
        for shape in found:
            assert len(shape) == len(axes)
            assert all(size % 8 == 0 for size, axis in zip(shape, axes, strict=True) if axis), pattern


def test_what_is_not_split_is_small():
    for name, most in (("swin_t", 0.03), ("swin_l", 0.025)):
        sizes = {path: jax.numpy.prod(jax.numpy.array(shape)).item() for path, shape in paths(name).items()}
        whole = sum(size for path, size in sizes.items() if not any(rule_of(path)))
        assert whole < most * sum(sizes.values()), f"{name}: {whole:,} numbers lie on every device"
    assert all(any(rule_of(path)) for path, size in sizes.items() if size > 600_000)


def test_optimizer_state_and_average_lie_as_their_parameters(state):
    mesh = abstract_mesh(2, 2, 2)
    wanted = {path: where.spec for path, where in flatten_dict(partition(state.params, mesh), sep="/").items()}
    assert wanted["name_generator/t5/lm_head/kernel"] == PartitionSpec("fsdp", "tensor")
    assert {path: where.spec for path, where in flatten_dict(partition(state.average, mesh), sep="/").items()} == wanted
    moments = {}
    for keys, where in jax.tree_util.tree_leaves_with_path(partition(state.opt_state, mesh)):
        path = path_of(keys)
        if path:
            assert where.spec == wanted[path]
            moments[path] = moments.get(path, 0) + 1
        else:
            assert not any(where.spec)
    frozen = {"name_generator/t5/lm_head/kernel", "name_generator/t5/shared/embedding"}
    assert moments == dict.fromkeys(wanted.keys() - frozen, 2)


def test_an_axis_that_does_not_divide_a_dimension_is_dropped(state):
    mesh = abstract_mesh(1, 5, 7)
    head = partition(state.params, mesh)["name_generator"]["t5"]["lm_head"]["kernel"]  # 768 × 32128
    assert head.spec == PartitionSpec(None, None)
