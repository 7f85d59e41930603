"""Files of configs/ and their overrides, as every command takes them, and one line for what is wrong with them."""

import re
from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from opendet_jax.config import Config, ConfigError


def config_from_arguments(arguments: Sequence[str]) -> Config:
    """`--config=configs/minilvis.py --config.train.seed=1 …` as a validated Config.

    Raises ConfigError for a missing file, an argument that is none of these, and a field that does not exist.
    """
    values, command = flags.FlagValues(), ["", *arguments]
    flag = config_flags.DEFINE_config_file("config", None, flag_values=values, lock_config=True, sys_argv=command)
    try:
        unknown = values(command)[1:]
    except (AttributeError, KeyError, flags.Error) as error:
        raise ConfigError(flag_problem(error)) from error
    if unknown:
        raise ConfigError(f"{unknown[0]!r} is no argument: fields of the config are set by --config.<field>=<value>")
    return read_flag(flag)


def read_flag(flag: flags.FlagHolder) -> Config:
    """The Config of a --config flag. Raises ConfigError, also where there is none or its file is missing."""
    if flag.value is None:
        raise ConfigError("--config is missing: name a file of configs/")
    try:
        sections = dict(flag.value.items())
    except OSError as error:  # put off by ml_collections until here
        cause = error.__cause__ or error
        raise ConfigError("--config: " + str(cause).strip().splitlines()[-1].strip()) from error
    return Config.from_dict(sections)


def flag_problem(error: Exception) -> str:
    """What was wrong with the arguments, for someone at a keyboard."""
    if not isinstance(error, flags.Error):
        return "a --config field does not exist: " + str(error.args[0]).replace("\n", " ")
    refused = re.search(r"^opendet_jax\.[\w.]+: (.*)", str(error), re.MULTILINE | re.DOTALL)  # at a traceback's end
    return refused[1].strip() if refused else str(error)
