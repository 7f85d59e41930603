"""The same step on one device, on several, and in several processes; and what devices tell each other in it."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from opendet_jax.scaling.program import Collective, collectives
from tests.reliability.programs import free_port

pytestmark = pytest.mark.slow  # minutes
DEVICES = 8
ONE = "1,1,1"
MESHES = ("2,1,1", "4,1,1", "8,1,1", "1,8,1", "2,4,1", "1,1,2", "2,1,4", "2,2,2")  # data, fsdp, tensor
ACCUMULATED, ACCUMULATED_ON_MANY = "1,1,1,2", "2,2,1,2"  # in two parts
RELATIVE, ZERO = 1e-5, 1e-7


def start(out: Path, devices: int, *arguments: str) -> subprocess.Popen:
    flags = f"--xla_force_host_platform_device_count={devices}"
    command = [sys.executable, "-m", "tests.train.on_meshes", str(out), *arguments]
    return subprocess.Popen(command, env={**os.environ, "XLA_FLAGS": flags}, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> None:
    _, errors = process.communicate()
    assert process.returncode == 0, errors


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """Of one device and of every mesh."""
    out = tmp_path_factory.mktemp("meshes")
    finish(start(out, DEVICES, ONE, *MESHES, ACCUMULATED, ACCUMULATED_ON_MANY))
    return out


@pytest.fixture(scope="module")
def processes(tmp_path_factory) -> Path:
    """Two processes of two devices."""
    out, port = tmp_path_factory.mktemp("processes"), free_port()
    both = [start(out, 2, "2,2,1", f"--process={number},2,localhost:{port}") for number in range(2)]
    for process in both:
        finish(process)
    return out


def assert_same(one: Path, other: Path) -> None:
    """Each array to 1e-5 of its norm: loss terms, gradients, parameters.

    A gradient below 1e-7 of the whole is zero but for rounding, which is all it holds: a bias in front of GroupNorm.
    """
    with np.load(one) as want, np.load(other) as got:
        assert got.files == want.files
        whole = np.sqrt(sum(np.square(want[name]).sum() for name in want.files if name.startswith("gradient:")))
        for name in want.files:
            error, size = np.linalg.norm(got[name] - want[name]), np.linalg.norm(want[name])
            if name.startswith("gradient:") and size < ZERO * whole:
                assert np.linalg.norm(got[name]) < ZERO * whole, name
            else:
                assert error <= RELATIVE * size, f"{name}: {error / size:.1e} of {size:.1e}"


def shapes_of_parameters(results: Path) -> set[tuple[int, ...]]:
    with np.load(results) as found:
        return {found[name].shape for name in found.files if name.startswith("parameter:")}


def inside(small: tuple[int, ...], shapes: set[tuple[int, ...]]) -> bool:
    """Whether it is one of the shapes, or a part of one over axes of two devices; a gradient may lie transposed."""
    return any(
        len(small) == len(shape) and all(a in (b, b // 2, b // 4) for a, b in zip(turned, shape, strict=True))
        for shape in shapes
        for turned in (small, small[::-1])
    )


@pytest.mark.parametrize("mesh", MESHES)
def test_numbers_are_those_of_one_device(results, mesh):
    assert_same(results / f"{ONE}.npz", results / f"{mesh}.npz")


def test_accumulated_numbers_are_those_of_one_device(results):
    assert_same(results / f"{ACCUMULATED}.npz", results / f"{ACCUMULATED_ON_MANY}.npz")


def test_numbers_of_two_processes_are_those_of_one_device(results, processes):
    assert_same(results / f"{ONE}.npz", processes / "2,2,1.npz")


def test_one_device_communicates_nothing(results):
    assert collectives((results / f"{ONE}.hlo").read_text(), 1) == []


def check_collectives(results: Path, mesh: str) -> list[Collective]:
    """Parameters are gathered, parts of gradients change places, sums are reduced; activations stay where they are."""
    found = collectives((results / f"{mesh}.hlo").read_text(), DEVICES)
    parameters = shapes_of_parameters(results / f"{ONE}.npz")
    assert {c.kind for c in found} <= {"all-reduce", "all-gather", "reduce-scatter", "collective-permute"}
    for c in found:
        if c.kind in ("all-gather", "collective-permute"):
            for array in c.results:
                assert inside(array.shape, parameters), f"{c.kind} of {array}, which is no parameter"
    return found


def test_only_parameters_are_gathered(results):
    found = check_collectives(results, "2,2,2")
    assert {"all-reduce", "all-gather"} <= {c.kind for c in found}
    assert all(c.group == 2 for c in found if c.in_loop), "loops of different lengths must not wait for others"


def test_accumulation_gathers_parameters_once(results):
    found = check_collectives(results, ACCUMULATED_ON_MANY)
    assert {c.kind for c in found if not c.in_loop} == {"all-gather", "all-reduce"}
    assert {c.kind for c in found if c.in_loop} == {"all-reduce"}, "a part's gradients are summed when it is done"


def test_data_parallelism_only_sums(results):
    found = check_collectives(results, "8,1,1")
    assert {c.kind for c in found} == {"all-reduce"}
    assert not any(c.in_loop for c in found)
    gradient = sum(array.bytes for c in found for array in c.results if len(array.shape) > 0)
    with np.load(results / f"{ONE}.npz") as one:
        parameters = sum(one[name].nbytes for name in one.files if name.startswith("parameter:"))
    assert gradient < 1.05 * parameters, "each gradient is summed once, and hardly anything else"
