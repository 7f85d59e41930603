"""Shared by all tests: shapes in annotations are checked at run time; environment variables name outside data."""

import gc
import os
import tarfile
from pathlib import Path

import jax
import pytest
from jaxtyping import install_import_hook

install_import_hook("opendet_jax", "beartype.beartype")

from opendet_jax.compilation import enable_cache  # noqa: E402  (imported under the hook)

# Most tests run for a moment what takes a minute to compile, and so do the programs that they start. XLA's older way of
# making CPU kernels, which jax 0.11 has no more, takes three quarters of the time of that by MLIR, which is what others
# compile with, and `make parity`. Programs in one piece instead of 32 take a tenth less: both cores have tests to run.
# Without sums by trees a training step takes a fifth less: each of them is a kernel outside of the fusions, for which
# XLA walks through the whole program.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
FLAGS = ("use_fusion_emitters=false", "parallel_codegen_split_count=1")
if jax.__version_info__ < (0, 11):
    flags = ["--xla_disable_hlo_passes=tree_reduction_rewriter", *(f"--xla_cpu_{flag}" for flag in FLAGS)]
    os.environ.setdefault("XLA_FLAGS", " ".join(flags))
jax.config.update("jax_disable_most_optimizations", True)
gc.set_threshold(300_000, 50, 50)  # tracing makes objects that live: collecting at the usual times is a sixth of it
enable_cache()  # modules and processes share what they compile
pytest_plugins = ("tests.parity.plugin",)

# The files that take minutes, longest first. With two processes the last one should not be left with one of them.
LONG = (
    "parity/test_training.py",
    "parity/test_detector.py",
    "end_to_end/test_program.py",
    "train/test_step.py",
    "end_to_end/test_finetune.py",
    "model/test_opendet.py",
    "reliability/test_resume.py",
    "reliability/test_non_finite.py",
    "test_shapes.py",
    "checkpoints/test_written_before.py",
    "parity/test_transformers.py",
    "weights/test_convert.py",
)


def pytest_collection_modifyitems(items):
    places = {Path(__file__).parent / file: place for place, file in enumerate(LONG)}
    assert all(file.is_file() for file in places), LONG
    items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.fixture(scope="module", autouse=True)
def memory_is_given_back():
    """Compiled programs hold memory for good: several modules' worth of them fill a small machine."""
    yield
    gc.collect()
    jax.clear_caches()


def _folder(variable: str) -> Path:
    value = os.environ.get(variable)
    if not value:
        pytest.skip(f"{variable} is not set")
    folder = Path(value)
    assert folder.is_dir(), f"{variable}={value} is not a folder"
    return folder


@pytest.fixture(scope="session")
def run_written_before(tmp_path_factory) -> Path:
    """The workdir of a tiny run that an earlier version made (tests/checkpoints/test_written_before.py)."""
    folder = tmp_path_factory.mktemp("before")
    with tarfile.open(Path(__file__).parent / "checkpoints" / "written_before.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder / "run"


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Photographs, names and tokenizers (OPENDET_DATA)."""
    return _folder("OPENDET_DATA")


@pytest.fixture(scope="session")
def vectors_folder(request) -> Path:
    """Numbers computed by the authors' program (--vectors, or OPENDET_VECTORS)."""
    given = request.config.getoption("--vectors")
    return Path(given) if given else _folder("OPENDET_VECTORS")
