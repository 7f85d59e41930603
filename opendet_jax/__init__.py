"""Open-Det in JAX. `load(folder)` gives a Detector; `Detector.detect(image)` gives Detections: boxes with names.
`run_exported(folder)` gives one that runs exported programs.

The parts are imported when they are first used, so that `import opendet_jax` is quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opendet_jax.exported import run_exported
    from opendet_jax.predict.detections import Detections
    from opendet_jax.predict.detector import Detector, load

__version__ = "0.1.0"
__all__ = ["Detections", "Detector", "__version__", "load", "run_exported"]

_MODULES = {
    "Detections": "opendet_jax.predict.detections",
    "Detector": "opendet_jax.predict.detector",
    "load": "opendet_jax.predict.detector",
    "run_exported": "opendet_jax.exported",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
