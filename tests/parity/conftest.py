"""Last digits are compared of what people run: with all of the compiler's optimisations."""

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def optimised():
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
