"""Run by test_dependencies.py and test_exported.py: FOLDER NAME…; detects where modules NAME cannot be imported.

Prints json. Of a checkpoint, for which it imports the whole package: the modules of Pallas's kernels that were imported
up to then, and the kernels in deformable attention lowered for NVIDIA's GPUs. Of exported programs: what they find in
the pictures whose paths are lines of the standard input.
"""

import importlib
import json
import pkgutil
import sys
from dataclasses import astuple
from importlib.abc import MetaPathFinder
from pathlib import Path


class Hidden(MetaPathFinder):
    def find_spec(self, fullname, path, target=None):
        if fullname in sys.argv[2:]:
            raise ModuleNotFoundError(f"{fullname} is hidden")


sys.meta_path.insert(0, Hidden())

import jax  # noqa: E402
import numpy as np  # noqa: E402

import opendet_jax  # noqa: E402
from opendet_jax.ops.deformable_attention import deformable_attention  # noqa: E402
from tests.ops.deformable_attention_cases import arguments, kernels_in, lowered, with_gradients  # noqa: E402

KERNELS = ("pallas_gpu", "pallas_tpu")


def main() -> None:
    if (Path(sys.argv[1]) / "programs.json").exists():
        found = opendet_jax.run_exported(sys.argv[1]).detect(sys.stdin.read().splitlines(), min_score=0.0)
        print(json.dumps([astuple(detections) for detections in found], default=np.ndarray.tolist))
        return
    for module in pkgutil.walk_packages(opendet_jax.__path__, "opendet_jax."):
        if module.name.rpartition(".")[2] not in ("__main__", *KERNELS):
            importlib.import_module(module.name)
    detector = opendet_jax.load(sys.argv[1], checkpoint=4)
    found = detector.detect(np.zeros((32, 32, 3), np.uint8), min_score=0.0)
    imported = [name for name in sys.modules if "jax.experimental.pallas" in name or name.endswith(KERNELS)]
    for _ in range(2):
        jax.clear_caches()
        kernels = kernels_in(lowered(with_gradients(deformable_attention), arguments(), "cuda"))
    print(json.dumps({"found": len(found), "imported": imported, "kernels": kernels["triton"]}))


if __name__ == "__main__":
    main()
