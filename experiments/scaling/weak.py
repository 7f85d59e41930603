"""Weak scaling that is really run, on forced CPU devices: a core and two images for each.

    python -m experiments.scaling.weak [--devices 1 2]

The step is that of configs/scenes_tiny.py, by the program's own loop. It shows that the sharded program costs little
more than the plain one; of networks and accelerators it says nothing.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

IMAGES = 2  # of each device
STEPS = 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--devices", type=int, nargs="+", default=[1, cores], help="default: 1, and one for each core")
    parser.add_argument("--one", type=int, help="measure so many devices in this process and print json")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one)))
        return
    print("| devices | images a step | seconds a step, median | images a second |\n|---|---|---|---|")
    for devices in arguments.devices:
        command = [sys.executable, "-m", "experiments.scaling.weak", "--one", str(devices)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        seconds = json.loads(done.stdout.splitlines()[-1])
        images = IMAGES * devices
        print(f"| {devices} | {images} | {seconds:.3f} | {images / seconds:.2f} |", flush=True)


def measure(devices: int) -> float:
    """Seconds of a step."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:devices])
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    import jax

    assert jax.device_count() == devices
    from configs.scenes_tiny import get_config
    from opendet_jax.config_files import parse_config
    from opendet_jax.train.run import Run

    config = parse_config(get_config())
    config = replace(config, data=replace(config.data, batch_size=IMAGES * devices, scenes_train=200, scenes_eval=4))
    with TemporaryDirectory() as folder:
        run = Run(config, Path(folder))
        times = []
        for _ in range(STEPS + 1):  # the first one compiles
            start = time.perf_counter()
            jax.block_until_ready(run.take_step())
            times.append(time.perf_counter() - start)
        run.close()
    return statistics.median(times[1:])


if __name__ == "__main__":
    main()
