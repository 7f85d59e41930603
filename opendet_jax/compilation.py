"""How programs are compiled, and kept on disk, so that only the first run of a config waits for the compiler."""

import ctypes
import os
import sys
import time
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm


def enable_cache() -> None:
    """Keeps compiled programs in ~/.cache/opendet_jax, unless JAX_COMPILATION_CACHE_DIR names another folder."""
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "opendet_jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


def compiler_options(platform: str) -> dict[str, str]:
    """Of `jax.jit` for a program of thousands of operations.

    On CPUs XLA hands sums, too, to a library (YNN), and looks for each of them among all operations when it loads the
    program from disk: that of the full training step in 69 s, with products alone handed over in about 43.
    """
    if platform != "cpu":
        return {}
    return {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_DOT"}


def give_back_memory() -> None:
    """To the kernel, what compiling a program has used and glibc keeps: as much again as a small run needs."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim:
        trim(0)


class CompilingFirst(tqdm):
    """A bar of work whose first piece waits for the compiler: rate and time left are those of the pieces after it."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, smoothing=0, postfix="compiling", **options)

    def update(self, n: int | float | None = 1) -> bool | None:
        if self.n or self.disable:
            return super().update(n)
        self.n += n or 0
        self.initial, self.start_t = self.n, time.time()  # its own clock
        self.set_postfix_str("")
        return True
