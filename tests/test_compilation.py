"""Where compiled programs are kept, and that the program and the Python interface keep them."""

import io
import os
import re
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opendet_jax import compilation
from opendet_jax.compilation import CompilingFirst, StoredProgram, compiler_options, give_back_memory

PRINT = "from opendet_jax.compilation import enable_cache; enable_cache(); import jax; "
PRINT += "print(jax.config.jax_compilation_cache_dir); jax.jit(lambda x: x + 1)(1.0)"


def test_a_plain_place_or_the_one_that_is_named(tmp_path):
    kept = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PLATFORMS": "cpu"}
    for named, place in (({}, ".cache/opendet_jax"), ({"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "there")}, "there")):
        environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")} | kept
        environment |= {"HOME": str(tmp_path), **named}
        done = subprocess.run([sys.executable, "-c", PRINT], env=environment, capture_output=True, text=True)
        assert done.stdout.strip() == str(tmp_path / place), done.stderr


def test_the_program_starts_once_more_with_large_pages():
    """The flags that it was given are still there: a field that is wrong is found by the process with the variable."""
    show = "import os, atexit; atexit.register(lambda: print(os.environ.get('GLIBC_TUNABLES')))"
    main = f"{show}; import runpy; runpy.run_module('opendet_jax.main', run_name='__main__')"
    flags = ["--config=configs/scenes_tiny.py", "--workdir=nowhere", "--config.model.width=33"]
    own = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    for given, seen in (({}, "glibc.malloc.hugetlb=1"), ({"GLIBC_TUNABLES": ""}, "")):
        done = subprocess.run([sys.executable, "-c", main, *flags], env=own | given, capture_output=True, text=True)
        assert "error: config.model.width = 33" in done.stderr
        assert done.stdout == f"{seen if sys.platform == 'linux' else given.get('GLIBC_TUNABLES')}\n"


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_that_nobody_has_goes_back_to_the_kernel():
    arrays = [bytearray(60_000) for _ in range(3000)]  # too small for glibc to ask the kernel for each
    last = arrays[-1]  # above the rest, which glibc therefore keeps
    del arrays
    before = resident()
    give_back_memory()
    assert before - resident() > 100e6
    assert last


class Asked(Exception):
    pass


def ask():
    raise Asked


def test_the_program_keeps_them(monkeypatch, tmp_path):
    from opendet_jax import main
    from opendet_jax.config import Config

    monkeypatch.setattr("opendet_jax.compilation.enable_cache", ask)
    with pytest.raises(Asked):
        main.run("train", Config(), tmp_path)


def test_the_interface_keeps_them(tmp_path, monkeypatch):
    from opendet_jax.predict import detector

    monkeypatch.setattr(detector, "enable_cache", ask)
    with pytest.raises(Asked):
        detector.load(tmp_path)


def test_what_xla_hands_to_ynn_on_cpus():
    """Nothing from jax 0.11 on; before, products alone in training, where by default sums are too, and nothing of
    large models."""
    x = jnp.ones((64, 64))

    def function(x):
        return x @ x, jnp.tanh(x).sum(1)

    def count(lowered: jax.stages.Lowered) -> int:
        return len(re.findall(r"ynn_fusion[.\d]* = ", lowered.compile().as_text()))

    def handed_over(options: dict[str, str]) -> int:
        return count(jax.jit(function, compiler_options=options).lower(x))

    default, training, forward = ({}, compiler_options("cpu", trains=True), compiler_options("cpu"))
    small, large = ({"kernel": jax.ShapeDtypeStruct((size, 1000), jnp.float32)} for size in (5_000, 100_000))
    assert compiler_options("cpu", trains=True, params=small) == training
    assert handed_over(compiler_options("cpu", trains=True, params=large)) == 0
    if jax.__version_info__ >= (0, 11):
        assert handed_over(default) > handed_over(training) == handed_over(forward) == 0
    else:
        assert handed_over(forward) == handed_over(default) > handed_over(training) > 0
    assert count(StoredProgram(function).lower(x)) == handed_over(forward)
    assert compiler_options("gpu", trains=True) == compiler_options("tpu") == {}


def test_a_bar_leaves_out_the_piece_that_compiles(monkeypatch):
    screen, clock = io.StringIO(), [0.0]
    with CompilingFirst(total=20, file=screen, ncols=100) as bar:
        assert "compiling" in screen.getvalue()
        bar._time = lambda: clock[0]
        monkeypatch.setattr("time.time", bar._time)
        clock[0] = 100.0
        bar.update(4)
        clock[0] = 104.0
        bar.update(8)
        shown = str(bar)
    assert shown.startswith(" 60%")
    assert "12/20 [00:04<00:04,  2.00it/s]" in shown


DOUBLE = """
import sys, jax.numpy as jnp
from opendet_jax import compilation
compilation.enable_cache()
jax = compilation.jax
jax.config.update("jax_persistent_cache_min_compile_time_secs", float(sys.argv[2]))
traced = []

def double(x, by, most):
    traced.append(1)
    return {"of": jnp.minimum(2 * x["a"] * by, most)}

program = compilation.StoredProgram(double, sys.argv[1] or None)
for size in (3, 3, 4):
    print(program({"a": jnp.arange(size)}, 1.5, most=5)["of"].tolist(), end=" ")
print(program.count(), sum(traced))
"""


def stored(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (folder / "programs").glob("*")}


@pytest.mark.skipif(sys.platform != "linux", reason="programs are kept on Linux alone")
def test_a_stored_program_is_not_traced_again(tmp_path):
    def run(of: str = "two", least: str = "0", **environment: str) -> str:
        own = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
        own |= {"JAX_COMPILATION_CACHE_DIR": str(tmp_path), **environment}
        done = subprocess.run([sys.executable, "-c", DOUBLE, of, least], env=own, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert not done.stderr
        values, traced = done.stdout.rsplit(maxsplit=1)
        assert values == "[0.0, 3.0, 5.0] [0.0, 3.0, 5.0] [0.0, 3.0, 5.0, 5.0] 2"
        return traced

    assert run(least="100") == "2"  # compiled too soon to be kept
    assert not stored(tmp_path)
    assert run() == "2"  # once a shape
    first = stored(tmp_path)
    assert len(first) == 2
    assert run() == "0"
    # What else a program depends on: what it holds, jax's options, XLA's, whether it is kept at all.
    assert run(of="another") == "2"
    assert run(JAX_DEFAULT_MATMUL_PRECISION="highest") == "2"
    assert run(XLA_FLAGS="--xla_cpu_enable_fast_min_max=false") == "2"
    assert len(stored(tmp_path)) == 8
    assert run(JAX_ENABLE_COMPILATION_CACHE="false") == "2"
    assert len(stored(tmp_path)) == 8

    damaged, cut = sorted(first)
    (tmp_path / "programs" / damaged).write_bytes(first[damaged][:40] + b"?" + first[damaged][41:])
    (tmp_path / "programs" / cut).write_bytes(first[cut][:-1])
    assert run() == "2"
    os.utime(tmp_path / "programs" / damaged, (0, 0))  # used long ago, but it is used now
    os.utime(tmp_path / "programs" / cut, (0, 0))
    assert run() == "0"
    nobody = next(name for name in stored(tmp_path) if name not in first)
    os.utime(tmp_path / "programs" / nobody, (0, 0))
    assert run(of="a third") == "2"
    assert nobody not in stored(tmp_path)
    assert len(stored(tmp_path)) == 9
    assert run(of="") == "2"  # jax.jit
    assert len(stored(tmp_path)) == 9


def test_what_jax_has_read_from_its_own_cache_is_not_stored(tmp_path):
    """It could not be run (findings/jax_serialize_cached_program.sh)."""
    before = DOUBLE.replace("sys.argv[1] or None", "None")  # jax.jit, which uses jax's cache
    own = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path)}
    for script, traced in ((before, "2"), (DOUBLE, "2"), (DOUBLE, "2")):
        done = subprocess.run([sys.executable, "-c", script, "x", "0"], env=own, capture_output=True, text=True)
        assert done.stdout.split()[-1] == traced, done.stderr
    assert not stored(tmp_path)


def test_options_of_jax_have_programs_of_their_own():
    program = StoredProgram(lambda x, by: x * by)
    assert program(np.ones(3, np.float32), 2.0).dtype == jnp.float32
    with jax.enable_x64(True):
        assert program(np.ones(3), 2.0).dtype == jnp.float64
    assert program(np.ones(3), 2.0).dtype == jnp.float32  # two kinds of array, and options twice
    assert program.count() == 3


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """A program that could be kept, and the folder where."""
    monkeypatch.setattr(compilation, "_folder", lambda: tmp_path / "programs")
    least = jax.config.values["jax_persistent_cache_min_compile_time_secs"]
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    yield lambda function, *arrays: StoredProgram(function, str(tmp_path))(*arrays), tmp_path / "programs"
    jax.config.update("jax_persistent_cache_min_compile_time_secs", least)


def missing(name: str) -> str:
    raise PackageNotFoundError(name)


def new_function():
    """One that jax's cache has not: what it has is not stored."""
    number = time.time_ns() % 2**30
    return number, lambda x: x + number


@pytest.mark.skipif(sys.platform != "linux", reason="programs are kept on Linux alone")
@pytest.mark.parametrize("what", ["changed", "absent", "elsewhere", "unknown"])
def test_nothing_is_stored_where_it_is_not_known_what_a_program_depends_on(kept, monkeypatch, what):
    run, folder = kept
    if what == "changed":  # since the process has read them
        monkeypatch.setattr(compilation, "_SOURCES", "of yesterday")
    elif what == "absent":
        monkeypatch.setattr(compilation, "_SOURCES", None)
    elif what == "elsewhere":
        monkeypatch.setattr(compilation, "_can_be_written", lambda folder: False)
    else:
        monkeypatch.setattr(compilation, "version", missing)
    compilation._surroundings.cache_clear()
    number, function = new_function()
    np.testing.assert_array_equal(run(function, np.arange(3)), number + np.arange(3))
    compilation._surroundings.cache_clear()
    assert not folder.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="programs are kept on Linux alone")
def test_programs_of_other_users_are_not_run(kept, monkeypatch):
    run, folder = kept
    run(new_function()[1], np.arange(3))
    [file] = folder.iterdir()
    assert compilation._read(file) is not None
    monkeypatch.setattr("os.getuid", lambda: os.stat(file).st_uid + 1)
    assert compilation._read(file) is None


@pytest.mark.skipif(sys.platform != "linux", reason="programs are kept on Linux alone")
def test_what_cannot_be_written_runs(kept):
    run, folder = kept
    seen = []

    def noted(x):
        jax.debug.callback(seen.append, x.sum())
        return x + 1

    np.testing.assert_array_equal(run(noted, np.arange(3)), [1, 2, 3])
    jax.effects_barrier()
    assert seen == [3]
    assert not folder.exists()
