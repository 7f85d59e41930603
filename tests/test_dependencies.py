"""The package needs what requirements.txt names less what only tests need, and no kernel's back end to run on a CPU."""

import json
import os
import re
import subprocess
import sys
import tarfile
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ARCHIVE = ROOT / "tests/checkpoints/written_before.tar.xz"
TRITON = ("jax.experimental.pallas.triton", "jax._src.pallas.triton")
FOR_TESTS = ("lvis", "opencv-python")  # in requirements.txt, where lvis brings the other
OF_REQUIRED = ("scipy",)  # scikit-learn needs it
ELSEWHERE = ("cuda", "tpu", "docs")  # extras of other machines and of another environment


def optional() -> set[str]:
    """The modules of what the package can do without, as far as it is installed."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    wanted = {
        re.split(r"[<>=\[;]", requirement)[0].lower()
        for extra, requirements in extras.items()
        if extra not in ELSEWHERE
        for requirement in requirements
    }
    wanted = (wanted | set(FOR_TESTS)) - set(OF_REQUIRED)
    return {
        module
        for module, distributions in packages_distributions().items()
        if any(name.lower() in wanted for name in distributions)
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("before")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder / "run"


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


def test_it_detects_without_any_optional_package_and_imports_no_kernel(run):
    hidden = optional()
    assert {"torch", "lvis", "cv2", "beartype", "pytest"} <= hidden
    assert hidden.isdisjoint({"jax", "numpy", "scipy", "pycocotools"})
    said, error = detect_without(run, *sorted(hidden))
    assert said["found"] > 0
    assert said["imported"] == []
    assert said["calls"] == 2
    assert "cannot lower" not in error


@pytest.mark.parametrize("gone", [TRITON, ("jax.experimental.pallas",)], ids=["triton", "pallas"])
def test_without_the_kernels_back_end_xla_does_their_work_and_it_is_said_once(run, gone):
    said, error = detect_without(run, *gone)
    assert said["found"] > 0
    assert said["calls"] == 0
    assert error.count("cannot lower the kernels for cuda") == 1
    assert f"{gone[0]} is hidden" in error
