"""Train, evaluate or predict.

    python -m opendet_jax.main --config=configs/scenes_tiny.py --workdir=runs/scenes_tiny --mode=train
    python -m opendet_jax.main --config=configs/scenes_tiny.py --workdir=runs/scenes_tiny --mode=eval
    python -m opendet_jax.main --config=configs/scenes_tiny.py --workdir=runs/scenes_tiny --mode=predict \
        --config.predict.inputs='photos/*.jpg'

Any field of the config can be set from the command line: --config.train.steps=1000.
Running a training command again continues from the newest checkpoint of its workdir. A step whose loss is not finite
leaves its batch in <workdir>/non_finite/; --mode=replay --config.train.replay=FILE takes it again and shows where it
began.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from opendet_jax.config import Config

CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", "", "Folder of checkpoints, metrics and results; empty: runs/<config.name>.")
MODE = flags.DEFINE_enum("mode", "train", ["train", "eval", "predict", "replay"], "What to do.")
flags.mark_flag_as_required("config")


def main(_: Sequence[str]) -> None:
    from opendet_jax.config_files import check_paths, read_flag
    from opendet_jax.errors import InputError

    logging.set_verbosity(logging.WARNING)
    try:
        config = read_flag(CONFIG)
        check_paths(config, MODE.value)
        run(MODE.value, config, Path(WORKDIR.value or f"runs/{config.name}"))
    except InputError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped")


def run(mode: str, config: Config, workdir: Path) -> None:
    """What is imported only now takes seconds to load: longer than to find what is wrong with a field."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # nothing here needs PyTorch
    from opendet_jax.compilation import enable_cache
    from opendet_jax.parallel.processes import join_processes

    enable_cache()
    if mode in ("train", "eval"):
        join_processes(config.mesh)
    if mode == "train":
        from opendet_jax.train.training_loop import train

        train(config, workdir)
    elif mode == "eval":
        from opendet_jax.evaluate.loop import evaluate_checkpoint

        evaluate_checkpoint(config, workdir)
    elif mode == "predict":
        from opendet_jax.predict.predictions import predict_from_config

        predict_from_config(config, workdir)
    else:
        from opendet_jax.train.replay import replay

        replay(config, workdir)


def parse_flags(arguments: Sequence[str]) -> list[str]:
    """Command-line flags; a config field that does not exist ends the program with the nearest right name."""
    from opendet_jax.config_files import flag_problem

    try:
        return flags.FLAGS(arguments)
    except (AttributeError, KeyError, flags.Error) as error:
        sys.exit(f"error: {flag_problem(error)}")


def take_large_pages() -> None:
    """Starts the process once more with memory in pages of 2 MiB, which glibc is told of at a start alone.

    XLA on CPUs takes the memory of every step from the kernel and gives it back, and the kernel fills it with zeros,
    page by page: with pages of 4 KiB that is a sixth of the time of a small step. Other C libraries ignore the
    variable; where it is set already, it stays as it is.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


if __name__ == "__main__":
    take_large_pages()
    app.run(main, flags_parser=parse_flags)
