"""XLA's compiled programs kept on disk, so that only the first run of a config waits for the compiler."""

import os
from pathlib import Path

import jax


def enable_cache() -> None:
    """Keeps compiled programs in ~/.cache/opendet_jax, unless JAX_COMPILATION_CACHE_DIR names another folder."""
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "opendet_jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
