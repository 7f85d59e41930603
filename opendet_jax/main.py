"""The program: `opendet`, or `python -m opendet_jax.main` with flags alone.

    opendet train scenes_tiny                  python -m opendet_jax.main --config=configs/scenes_tiny.py --mode=train
    opendet eval --workdir=runs/scenes_tiny    python -m opendet_jax.main --workdir=runs/scenes_tiny --mode=eval
    opendet predict photos --workdir=runs/scenes_tiny
                                               python -m opendet_jax.main --workdir=runs/scenes_tiny --mode=predict \
                                                   --config.predict.inputs=photos

--config names a file, or one of those that come with the program (configs/). Any field of it can be set on the command
line: --config.train.steps=1000. Evaluation and prediction need none: the checkpoint has it. --workdir is the folder of
checkpoints, metrics and results: runs/<config.name> unless it is given.
Running a training command again continues from the newest checkpoint of its workdir. A step whose loss is not finite
leaves its batch in <workdir>/non_finite/; --mode=replay --config.train.replay=FILE takes it again and shows where it
began.
"""

import difflib
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from opendet_jax import __version__
from opendet_jax.config import Config
from opendet_jax.errors import InputError

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A file, or the name of one that comes with the program: swin_t.", lock_config=True
)
WORKDIR = flags.DEFINE_string(
    "workdir",
    "",
    "Folder of checkpoints, metrics and results; empty: runs/<config.name>. Of a model on the hub: hf://user/model.",
)
MODE = flags.DEFINE_enum("mode", "train", ["train", "eval", "predict", "replay"], "What to do.")

HELP = """Open-Det: finds what is in a picture, and names it itself.

  opendet train CONFIG                   train; the same command again goes on
  opendet eval --workdir=DIR             score the checkpoint in DIR on its data set
  opendet predict PICTURES --workdir=DIR boxes and names on pictures, folders or globs
  opendet demo --workdir=DIR             the same, in a page in the browser
  opendet prepare …                      a downloaded data set into shards, for training at scale
  opendet show …                         a picture of what training sees
  opendet evaluate …                     score any program's detections
  opendet weights …                      published weights in and out, models to and from the hub, text embeddings
  opendet export DIR …                   a model's weights for other programs
  opendet programs DIR --out FOLDER      a model as programs that need jax alone
  opendet replay FILE …                  take a step again whose loss was not finite

CONFIG is a file, or one of those that come with the program: {configs}.
DIR is a run's folder, a folder of converted weights, a model on the Hugging Face hub (hf://user/model), or the model
that comes with the program: scenes_tiny.
Any field of a config is set by --config.FIELD=VALUE: opendet train scenes_tiny --config.train.steps=100
"opendet COMMAND --help" says more. From nothing to boxes with names: opendet predict PICTURES --workdir=scenes_tiny"""

# Of the commands that are modes of `main`, the flag whose value may stand alone; of the others the module that does it,
# what goes before its arguments, and what its help calls it.
FLAGS_OF = {"train": "config", "eval": "config", "predict": "config.predict.inputs", "replay": "config.train.replay"}
COMMANDS = {
    "prepare": ("data.__main__", ["prepare"], "opendet"),
    "show": ("data.__main__", ["show"], "opendet"),
    "evaluate": ("evaluate.__main__", [], "opendet evaluate"),
    "weights": ("weights.__main__", [], "opendet weights"),
    "export": ("weights.__main__", ["export"], "opendet"),
    "programs": ("exported", [], "opendet programs"),
    "demo": ("demo", [], "opendet demo"),
}


def main(_: Sequence[str]) -> None:
    from opendet_jax.config_files import check_paths, read_flag

    logging.set_verbosity(logging.WARNING)
    try:
        config = read_flag(CONFIG)
        check_paths(config, MODE.value)
        run(MODE.value, config, WORKDIR.value or f"runs/{config.name}")
    except InputError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped")


def run(mode: str, config: Config, workdir: Path | str) -> None:
    """What is imported only now takes seconds to load: longer than to find what is wrong with a field."""
    from opendet_jax.checkpoints.hub import is_name

    if is_name(workdir) and mode in ("train", "replay"):
        raise InputError(f"--workdir={workdir}: a run has its own folder; --config.init.model={workdir} begins with it")
    doing = {"train": "training", "eval": "evaluating", "predict": "predicting with", "replay": "replaying a step of"}
    print(f"opendet_jax {__version__}: {doing[mode]} {config.name} in {workdir}", flush=True)
    from opendet_jax.compilation import enable_cache
    from opendet_jax.parallel.processes import join_processes

    enable_cache()
    if mode in ("train", "eval"):
        join_processes(config.mesh)
    if mode == "train":
        from opendet_jax.train.training_loop import train

        train(config, Path(workdir))
    elif mode == "eval":
        from opendet_jax.evaluate.loop import evaluate_checkpoint

        evaluate_checkpoint(config, workdir)
    elif mode == "predict":
        from opendet_jax.predict.predictions import predict_from_config

        predict_from_config(config, workdir)
    else:
        from opendet_jax.train.replay import replay

        replay(config, Path(workdir))


def parse_flags(arguments: Sequence[str]) -> list[str]:
    """Command-line flags; a config field that does not exist ends the program with the nearest right name."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # nothing here needs PyTorch
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # after two minutes of compiling XLA asks to file a bug
    from opendet_jax.config_files import find_configs, flag_problem

    try:
        sys.argv[:] = find_configs(with_config(arguments))  # where the flags of a config's fields are looked for
        return flags.FLAGS(sys.argv)
    except (AttributeError, KeyError, flags.Error) as error:
        sys.exit(f"error: {flag_problem(error)}")
    except InputError as error:
        sys.exit(f"error: {error}")


def with_config(arguments: Sequence[str]) -> list[str]:
    """The arguments; where they do not train and name no config, with that of the model in --workdir."""
    from opendet_jax.config_files import CONFIGS

    given = flags.FlagValues()
    flags.DEFINE_string("config", None, "", flag_values=given)
    flags.DEFINE_string("workdir", "", "", flag_values=given)
    flags.DEFINE_string("mode", "train", "", flag_values=given)
    given(arguments, known_only=True)
    if given.config or not given.workdir or given.mode == "train":
        return list(arguments)
    return [*arguments[:1], f"--config={CONFIGS}/trained.py:{given.workdir}", *arguments[1:]]


def take_large_pages() -> None:
    """Starts the process once more with memory in pages of 2 MiB, which glibc is told of at a start alone.

    XLA on CPUs takes the memory of every step from the kernel and gives it back, and the kernel fills it with zeros,
    page by page: with pages of 4 KiB that is a sixth of the time of a small step. Other C libraries ignore the
    variable; where it is set already, it stays as it is.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def opendet() -> None:
    """The console command."""
    command, *rest = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help", "help"):
        print(help_text())
    elif command == "--version":
        print(f"opendet_jax {__version__}")
    elif command in FLAGS_OF and {"-h", "--help"} & {*rest}:
        print(__doc__)
    elif command in FLAGS_OF:
        take_large_pages()
        sys.argv[1:] = flags_of(command, rest)
        app.run(main, flags_parser=parse_flags)
    elif command in COMMANDS:
        module, before, program = COMMANDS[command]
        import_module(f"opendet_jax.{module}").main([*before, *rest], program)
    else:
        near = difflib.get_close_matches(command, [*FLAGS_OF, *COMMANDS], n=1)
        sys.exit(f"error: there is no command {command!r}" + (f"; did you mean {near[0]}?" if near else "; see --help"))


def help_text() -> str:
    from opendet_jax.config_files import CONFIGS

    return HELP.format(configs=", ".join(sorted(path.stem for path in CONFIGS.glob("[!_]*.py"))))


def flags_of(command: str, arguments: Sequence[str]) -> list[str]:
    """As python -m opendet_jax.main takes them: what stands alone is the value of the flag that the command is for."""
    named, alone = [], []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("-"):
            alone.append(argument)
        elif "=" in argument or not rest or rest[0].startswith("-"):
            named.append(argument)
        else:
            named.append(f"{argument}={rest.pop(0)}")
    if command != "predict" and len(alone) > 1:
        sys.exit(f"error: opendet {command}: what is {alone[1]!r}? Flags are --NAME=VALUE")
    own = [f"--{FLAGS_OF[command]}=" + "\n".join(alone)] if alone else []
    whole_first = sorted([*named, *own], key=lambda flag: not flag.startswith("--config="))  # and then fields of it
    return [f"--mode={command}", *whole_first]


if __name__ == "__main__":
    take_large_pages()
    app.run(main, flags_parser=parse_flags)
