"""Compiles every point of the study that has no result yet: `python -m experiments.scaling.run [NAME …]`.

Results lie in experiments/scaling/points/, one json each; a point that is there is not compiled again, so the command
can be stopped and repeated, and a point that fails does not keep the others from being compiled. The compilers are
those of `make .venv-compile/done`. draw.py makes tables and pictures of the results.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

FOLDER = Path(__file__).parent / "points"
LEVEL = "O0"  # of the compiler, for a fast program: with its own, a point was not done after 17 minutes
PYTHON = Path(".venv-compile/bin/python")


class Point(NamedTuple):
    config: str
    topology: str
    mesh: str
    images: int = 2  # of each share of the batch, as in the paper
    fields: tuple[str, ...] = ("model.dtype=bfloat16", "model.remat=True")

    @property
    def name(self) -> str:
        axes = self.mesh.replace(":", "").replace(",", "-")
        return f"{self.config}_{self.topology.replace(':', '-')}_{axes}_{self.images}"

    def command(self) -> list[str]:
        return [
            *(str(PYTHON), "-m", "opendet_jax.scaling", f"--config=configs/{self.config}.py"),
            f"--level={LEVEL}",
            *(f"--topology={self.topology}", f"--mesh={self.mesh}", f"--images={self.images}"),
            *(f"--json={FOLDER / self.name}.json", *(f"--config.{field}" for field in self.fields)),
        ]


POINTS = (
    # Weak scaling: the same two pictures a device, on more and more devices.
    Point("swin_t", "v5e:2x2", "data:4"),
    Point("swin_t", "v5e:4x4", "data:16"),
    Point("swin_t", "v5e:8x8", "data:64"),
    Point("swin_t", "v5e:16x16", "data:256"),
    Point("swin_l", "v5e:2x2", "fsdp:4"),
    Point("swin_l", "v5e:4x4", "fsdp:16"),
    Point("swin_l", "v5e:8x8", "data:4,fsdp:16"),
    Point("swin_l", "v5e:16x16", "data:16,fsdp:16"),
    Point("swin_l", "v5p:2x2x1", "fsdp:4"),
    Point("swin_t", "h100:1", "data:1"),
    Point("swin_t", "h100:8", "data:8"),
    Point("swin_l", "h100:8", "fsdp:8"),
    # Other ways to split the same four devices.
    Point("swin_t", "v5e:2x2", "fsdp:4"),
    Point("swin_t", "v5e:2x2", "fsdp:2,tensor:2"),
    # How many pictures fit.
    Point("swin_t", "v5e:2x2", "data:4", 1),
    Point("swin_t", "v5e:2x2", "data:4", 4),
    Point("swin_t", "v5e:2x2", "data:4", 8),
    Point("swin_l", "v5e:2x2", "fsdp:4", 1),
    Point("swin_l", "v5e:2x2", "fsdp:4", 4),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [point.name for point in POINTS]
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all of " + ", ".join(names), default=names)
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(names)
    if unknown:
        parser.error(f"no such point: {', '.join(sorted(unknown))}")
    FOLDER.mkdir(exist_ok=True)
    chosen = [point for point in POINTS if point.name in arguments.names]
    missing = [point for point in chosen if not (FOLDER / f"{point.name}.json").exists()]
    print(f"{len(chosen) - len(missing)} of {len(chosen)} points are there")
    failed = []
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    for point in tqdm(missing, unit="point"):  # one at a time: a compilation takes gigabytes
        tqdm.write(f"{point.name}: {' '.join(point.command())}")
        if subprocess.run(point.command(), check=False, env=environment).returncode:
            failed.append(point.name)
    if failed:
        sys.exit(f"error: no result of {', '.join(failed)}")


if __name__ == "__main__":
    main()
