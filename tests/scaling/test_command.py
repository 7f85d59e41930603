"""The report of a compiled step, on this machine's CPU and with a model of three layers."""

import json
import sys

import jax
import jaxtyping
import pytest

from opendet_jax.config import MeshConfig
from opendet_jax.errors import InputError
from opendet_jax.parallel.mesh import make_mesh
from opendet_jax.scaling import __main__ as command
from opendet_jax.scaling import program as program_module
from opendet_jax.scaling.__main__ import lines, measure, refused
from opendet_jax.scaling.machines import MACHINES, Machine, TopologyError, bound, describe
from opendet_jax.scaling.program import Program, TooLargeError, compile_step
from tests.reliability import toy
from tests.reliability.programs import tiny

pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
MACHINE = Machine("cpu", "cpu", 1e9, 2.0**30, 1e9, 1e8, "made up")


@pytest.fixture
def point(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # shapes stand in the place of arrays
    toy.install(monkeypatch.setattr)
    config = tiny(ema=0.9)
    mesh = make_mesh(config.mesh)
    program = compile_step(config, mesh)
    return measure(config, "cpu:1", MACHINE, mesh, program), program


def test_sizes_are_those_of_the_state(point):
    found, program = point
    parameters = sum(leaf.size * 4 for leaf in jax.tree.leaves(program.state.params))
    assert found["memory"]["parameters"] == found["memory"]["average"] == parameters
    moments = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(program.state.opt_state))
    assert found["memory"]["optimizer"] == moments >= 2 * parameters
    assert found["memory"]["peak"] >= found["memory"]["arguments"] >= 4 * parameters
    assert found["flops"] > 1000
    assert found["collectives"] == {}
    assert found["fits"]
    assert (found["batch"], found["picture"], found["devices"]) == (2, [32, 32], 1)


def test_the_bound_is_the_longest_of_three():
    low = bound(MACHINE, flops=3e9, state_bytes=10**9, bytes_sent=1e8)
    assert (low.compute, low.memory, low.communication) == (3.0, 2.0, 1.0)
    assert (low.step, low.limit, low.communication_share) == (3.0, "compute", 1 / 6)
    assert bound(MACHINE, 0.0, 10**9, 3e8).limit == "communication"


def test_it_can_be_read(point):
    text = lines(point[0])
    assert "never run: compiled ahead of time, level default" in text
    assert "fits in        1,024" in text or "fits in 1,024" in text
    assert "Lower bound of the step's time (not a prediction)" in text
    assert "none" in text  # collectives


def test_products_of_the_trace_stand_in_for_what_a_compiler_does_not_count(point, monkeypatch):
    found, program = point
    assert found["flops_counted_by"] == "compiler"
    assert 0 < program.products < found["flops"]  # which has the optimizer, for one, too
    monkeypatch.setattr(Program, "cost", lambda *_: None)
    config = tiny(ema=0.9)
    found = measure(config, "cpu:1", MACHINE, make_mesh(config.mesh), program)
    assert (found["flops"], found["flops_counted_by"]) == (program.products, "trace")
    assert found["bound"]["compute_seconds"] == program.products / MACHINE.flops
    assert "TFLOP, of the traced program's products" in lines(found)


def test_a_program_that_does_not_fit_says_what_it_needs():
    config = tiny()
    mesh = make_mesh(config.mesh)
    said = lines(refused(config, "cpu:1", MACHINE, mesh, TooLargeError("does not fit", 3.0 * 2**30)))
    assert "DOES NOT FIT: it needs 3,072 MiB, a device has 1,024 MiB" in said
    assert "needs more" in lines(refused(config, "cpu:1", MACHINE, mesh, TooLargeError("does not fit", None)))


def test_axes_by_name():
    assert command.mesh_config("data:4,fsdp:2") == MeshConfig(4, 2, 1)
    assert command.mesh_config("data:-1") == MeshConfig(-1, 1, 1)
    for wrong in ("model:2", "data", "data:x"):
        with pytest.raises(InputError, match=f"--mesh={wrong}: must be axis:size"):
            command.mesh_config(wrong)


@pytest.mark.parametrize("name", ["a100:8", "v5e", "h100:eight", ""])
def test_unknown_machines_are_refused(name):
    with pytest.raises(TopologyError, match=f"--topology={name}: must be MACHINE:SHAPE.*{', '.join(MACHINES)}"):
        describe(name)


@pytest.fixture
def here(monkeypatch):
    """This machine's CPU in the place of a described one."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    toy.install(monkeypatch.setattr)
    monkeypatch.setattr(command, "describe", lambda topology: (MACHINE, jax.devices()[:1]))
    arguments = ["scaling", "--config=tests/reliability/tiny.py", "--topology=cpu:1", "--mesh=data:1", "--images=3"]

    def run(*more):
        monkeypatch.setattr(sys, "argv", [*arguments, *more])
        command.main()

    yield run
    jax.config.update("jax_optimization_level", "UNKNOWN")


def test_the_command(here, tmp_path, capsys):
    here(f"--json={tmp_path / 'point.json'}", f"--hlo={tmp_path / 'step.hlo'}", "--level=O1", "--config.train.ema=0.9")
    found = json.loads((tmp_path / "point.json").read_text())
    assert (found["batch"], found["images_per_share"], found["topology"], found["level"]) == (3, 3, "cpu:1", "O1")
    assert found["memory"]["average"] == found["memory"]["parameters"] > 0
    assert (tmp_path / "step.hlo").read_text().startswith("HloModule")
    assert capsys.readouterr().out.strip() == lines(found)


def test_the_command_refuses_what_cannot_be(here, capsys):
    for wrong, said in (
        ("--mesh=data:2", "config.mesh"),
        ("--images=0", "argument --images: 0 is less than 1"),
        ("--level=O4", "argument --level: invalid choice: 'O4'"),
        ("--config.model.dtype=float8", "model.dtype"),
    ):
        with pytest.raises(SystemExit) as ended:
            here(wrong)
        assert said in f"{ended.value}{capsys.readouterr().err}"


def test_what_the_compiler_says_of_memory(here, monkeypatch, capsys, tmp_path):
    class Full:
        def trace(self, *_):
            return self

        def lower(self):
            return self

        def compile(self, _):
            raise jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Used 17.12G of 15.75G hbm"
            )

    monkeypatch.setattr(program_module, "jit_step", lambda *_: Full())
    here(f"--json={tmp_path / 'point.json'}")
    assert json.loads((tmp_path / "point.json").read_text())["memory"]["peak"] == pytest.approx(17.12 * 2**30)
    assert "DOES NOT FIT: it needs 17,531 MiB" in capsys.readouterr().out
