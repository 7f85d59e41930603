"""Where compiled programs are kept, and that the program and the Python interface keep them."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from opendet_jax.compilation import CompilingFirst, compiler_options, give_back_memory

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


def test_sums_stay_with_xla_on_cpus():
    """Products alone are handed to YNN, where by default sums are too; of other platforms nothing is asked."""
    x = jnp.ones((64, 64))

    def handed_over(options: dict[str, str]) -> int:
        program = jax.jit(lambda x: (x @ x, jnp.tanh(x).sum(1)), compiler_options=options)
        return len(re.findall(r"ynn_fusion[.\d]* = ", program.lower(x).compile().as_text()))

    assert 0 < handed_over(compiler_options("cpu")) < handed_over({})
    assert compiler_options("gpu") == compiler_options("tpu") == {}


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
