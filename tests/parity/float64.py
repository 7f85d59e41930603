"""A module of these tests with float64 wherever model, losses and optimizer write float32.

`python -m tests.parity.float64 MODULE ARGUMENT …`, a process of its own: the names change their meaning before the
model is imported. Activations have the type that a config names, so the module asks for "float64" where it makes one.
"""

import importlib
import runpy
import sys
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

WITH_CONSTANTS = "layers", "neck", "encoder", "aligner"  # modules of the model that round constants with numpy


class Double(ModuleType):
    """numpy, whose float32 is float64."""

    float32 = np.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


def main(module: str, *arguments: str) -> None:
    jax.config.update("jax_enable_x64", True)
    jnp.float32 = jnp.float64
    for name in WITH_CONSTANTS:
        importlib.import_module(f"opendet_jax.model.{name}").np = Double("numpy")
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
