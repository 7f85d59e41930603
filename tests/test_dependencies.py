"""The package needs what requirements.txt names less what only tests need, and no kernel's back end to run on a CPU."""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
TRITON = ("jax.experimental.pallas.triton", "jax._src.pallas.triton")
FOR_TESTS = ("lvis", "opencv-python")  # in requirements.txt, where lvis brings the other
ELSEWHERE = ("cuda", "tpu", "docs")  # extras of other machines and of another environment


def modules_of(distributions: set[str]) -> set[str]:
    """The top-level modules of these packages, as far as they are installed."""
    return {
        module for module, names in packages_distributions().items() if distributions & {name.lower() for name in names}
    }


def required() -> set[str]:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return {re.split(r"[<>=]", line)[0].lower() for line in lines if not line.startswith("#")}


def optional() -> set[str]:
    """The modules of what the package can do without."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    wanted = {
        re.split(r"[<>=\[;]", requirement)[0].lower()
        for extra, requirements in extras.items()
        if extra not in ELSEWHERE
        for requirement in requirements
    }
    return modules_of(wanted | set(FOR_TESTS))


def imports(path: Path) -> set[str]:
    """The top-level modules that a file imports, at its head or later."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return {name.partition(".")[0] for name in found}


def test_what_is_imported_is_required_and_what_only_tests_need_is_not_imported():
    imported = set().union(*(imports(path) for path in ROOT.glob("opendet_jax/**/*.py"))) - {"opendet_jax"}
    foreign = imported - sys.stdlib_module_names
    # torch reads pickled weights, gradio shows a page, supervision takes detections, where they are installed.
    assert foreign - modules_of(required()) == {"gradio", "supervision", "torch"}
    assert foreign.isdisjoint(modules_of(set(FOR_TESTS)))


def constraints(stack: str) -> dict[str, str]:
    lines = (ROOT / "constraints" / f"{stack}.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


@pytest.mark.parametrize("stack", ["python3.11", "python3.13"])
def test_both_stacks_are_written_down_whole_and_within_what_is_required(stack):
    tested = {Requirement(name).name: version for name, version in constraints(stack).items()}
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    wanted = [line for line in lines if not line.startswith("#")]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for line in (*wanted, *extras["test"]):
        requirement = Requirement(line)
        assert requirement.specifier.contains(tested[requirement.name]), line


def detect_without(run: Path, *modules: str) -> tuple[dict, str]:
    """What tests/without_packages.py says, and its error output."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.without_packages", str(run), *modules],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def test_it_detects_without_any_optional_package_and_imports_no_kernel(run_written_before):
    hidden = optional()
    assert {"torch", "lvis", "cv2", "beartype", "pytest"} <= hidden
    assert hidden.isdisjoint({"jax", "numpy", "scipy", "pycocotools"})
    said, error = detect_without(run_written_before, *sorted(hidden))
    assert said["found"] > 0
    assert said["imported"] == []
    assert said["kernels"] == 2
    assert "cannot make" not in error


@pytest.mark.parametrize("gone", [TRITON, ("jax.experimental.pallas",)], ids=["triton", "pallas"])
def test_without_the_kernels_back_end_xla_does_their_work_and_it_is_said_once(run_written_before, gone):
    said, error = detect_without(run_written_before, *gone)
    assert said["found"] > 0
    assert said["kernels"] == 0
    assert error.count("cannot make the kernels for cuda") == 1
    assert f"{gone[0]} is hidden" in error
