"""Which files the ladder runs on (`--vectors`, or OPENDET_VECTORS), and the report of what it found.

A test with an argument of `KINDS` runs once for each file of that kind that has the keys named by its `needs` mark;
such a test that no file has keys for is an error. A test with the mark `minutes` takes the last file alone; with the
other files it is slow, though not too slow for `make parity`.
"""

import os
import subprocess
import tempfile
from datetime import date
from functools import cache
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

from tests.parity import report
from tests.parity.vectors import Vectors

KINDS = {
    "eval_vectors": "eval_*.npz",
    "train_vectors": "train_*.npz",
    "trajectory_vectors": "traj_*.npz",
    "unit_vectors": "units*.npz",
}
HEAD = Path(__file__).with_name("parity_head.md")
FAST, LADDER = "not slow", "minutes or not slow"  # what `make test` and `make parity` ask for


def pytest_addoption(parser):
    parser.addoption("--vectors", metavar="DIR", help="folder of the authors' numbers (default: OPENDET_VECTORS)")
    parser.addoption("--parity-report", metavar="FILE", help="write the parity table to this markdown file")
    parser.addoption("--trajectory-pictures", metavar="DIR", help="write the curves of training into this folder")


def pytest_configure(config):
    config.addinivalue_line("markers", "needs(*keys): the vectors' keys that a test cannot do without")
    config.addinivalue_line("markers", "minutes: for `make parity`; of several files all but the last are slow")
    if not hasattr(config, "workerinput") and report.ROWS not in os.environ:
        handle, path = tempfile.mkstemp(prefix="parity_", suffix=".jsonl")
        os.close(handle)
        os.environ[report.ROWS] = path


def folder_of(config) -> Path | None:
    name = config.getoption("--vectors") or os.environ.get("OPENDET_VECTORS")
    if not name:
        return None
    folder = Path(name)
    assert folder.is_dir(), f"{name} is not a folder of vectors"
    return folder


@cache
def _keys(path: Path) -> frozenset[str]:
    with np.load(path) as file:
        return frozenset(file.files)


def pytest_generate_tests(metafunc):
    for argument, pattern in KINDS.items():
        if argument not in metafunc.fixturenames:
            continue
        folder = folder_of(metafunc.config)
        if folder is None:
            skip = pytest.mark.skip(reason="neither --vectors nor OPENDET_VECTORS is given")
            metafunc.parametrize(argument, [pytest.param(None, marks=skip)], indirect=True)
            continue
        needed = [key for mark in metafunc.definition.iter_markers("needs") for key in mark.args]
        paths = [path for path in sorted(folder.glob(pattern)) if all(_has(path, key) for key in needed)]
        if paths:
            slow = [pytest.mark.slow] if metafunc.definition.get_closest_marker("minutes") else []
            files = [pytest.param(path, id=path.stem, marks=slow) for path in paths[:-1]]
            files.append(pytest.param(paths[-1], id=paths[-1].stem))
            metafunc.parametrize(argument, files, indirect=True, scope="module")
        else:
            problem = f"{folder}: no {pattern} has {', '.join(needed) or 'anything'}"
            metafunc.parametrize(argument, [problem], ids=["none"], indirect=True)


def _has(path: Path, key: str) -> bool:
    """A key ending in "/" stands for any key that starts with it."""
    keys = _keys(path)
    return any(k.startswith(key) for k in keys) if key.endswith("/") else key in keys


def _load(request) -> Vectors:
    if isinstance(request.param, str):
        pytest.fail(request.param)
    return Vectors(request.param)


@pytest.fixture(scope="module")
def eval_vectors(request) -> Vectors:
    return _load(request)


@pytest.fixture(scope="module")
def train_vectors(request) -> Vectors:
    return _load(request)


@pytest.fixture(scope="module")
def trajectory_vectors(request) -> Vectors:
    return _load(request)


@pytest.fixture(scope="module")
def unit_vectors(request) -> Vectors:
    return _load(request)


def _whole_ladder(config) -> bool:
    """Whether all of tests/parity was asked for, but for what is slow, on vectors that are there."""
    here = Path(__file__).parent
    whole = any("::" not in argument and here.is_relative_to(Path(argument).resolve()) for argument in config.args)
    whole = whole and not config.getoption("-k") and config.option.markexpr in ("", FAST, LADDER)
    return whole and folder_of(config) is not None


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session, exitstatus):
    config = session.config
    if hasattr(config, "workerinput") or config.getoption("--collect-only"):
        return
    config.parity_rows = report.read(Path(os.environ[report.ROWS]))
    Path(os.environ.pop(report.ROWS)).unlink(missing_ok=True)
    fast = config.option.markexpr == FAST
    missing = report.missing(config.parity_rows, fast) if _whole_ladder(config) and exitstatus == 0 else []
    config.parity_missing = missing
    if config.parity_missing:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
    target = config.getoption("--parity-report")
    for stage in getattr(config, "parity_missing", []):
        terminalreporter.write_line(f"ERROR: no file tests the stage {stage!r}", red=True)
    if not target:
        return
    table = report.markdown(config.parity_rows)
    terminalreporter.write_line(table)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    libraries = ", ".join(f"{name} {version(name)}" for name in ("jax", "flax", "transformers", "torch"))
    made = f"Written by the parity tests on {date.today()}, CPU, float32, commit {commit or '(none)'}; {libraries}.\n"
    Path(target).write_text(f"{HEAD.read_text()}\n{made}\n{table}")
