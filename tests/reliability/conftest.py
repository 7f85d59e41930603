"""The small program of toy.py in the place of the large one; programs compiled once, also for other processes."""

import jax
import pytest

from tests.reliability import toy


@pytest.fixture(scope="package", autouse=True)
def compiled_once(tmp_path_factory):
    """In a folder of their own: a process that is killed may leave half a program."""
    before, folder = jax.config.jax_compilation_cache_dir, str(tmp_path_factory.mktemp("compiled"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", folder)
        jax.config.update("jax_compilation_cache_dir", folder)
        yield
        jax.config.update("jax_compilation_cache_dir", before)


@pytest.fixture(autouse=True)
def small_model(monkeypatch):
    """In this process; others are told which program to run."""
    toy.install(monkeypatch.setattr)


@pytest.fixture
def whole_model(small_model, monkeypatch):
    """The large one in its place again."""
    monkeypatch.undo()


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder for the drawn scenes of all runs."""
    return tmp_path_factory.mktemp("scenes")
