"""Configs as arguments of the smaller commands."""

import pytest

from opendet_jax.config import ConfigError
from opendet_jax.config_files import config_from_arguments

# How ml_collections loads a file.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


def test_a_file_and_what_is_changed_in_it():
    config = config_from_arguments(
        ["--config=configs/scenes_tiny.py", "--config.data.batch_size=5", "--config.train.seed", "3"]
    )
    assert (config.name, config.data.batch_size, config.train.seed) == ("scenes_tiny", 5, 3)
    assert config_from_arguments(["--config=configs/minilvis.py:overfit"]).data.train_limit == 32


def test_a_mixture_on_the_command_line():
    mixture = "--config.data.mixture=({'annotations': 'b.json', 'images': 'b', 'weight': 0.5},)"
    [paths] = config_from_arguments(["--config=configs/scenes_tiny.py", mixture]).data.mixture
    assert (paths.annotations, paths.images, paths.weight) == ("b.json", "b", 0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--config is missing: name a file of configs/"),
        (["--config=configs/none.py"], r"--config: .*No such file or directory: 'configs/none\.py'"),
        (["--config=configs/minilvis.py:some"], r"^configs/minilvis\.py:some does not exist; there is"),
        (["--config=configs/minilvis.py", "--config.data.batchsize=3"], 'Did you mean "batch_size"'),
        (["--config=configs/minilvis.py", "--config.data.batch_size=three"], "batch_size=three"),
        (["--config=configs/minilvis.py", "--config.data.batch_size=0"], r"config\.data\.batch_size = 0: must be"),
        (["--config=configs/minilvis.py", "extra"], "'extra' is no argument"),
        (["--config=configs/minilvis.py", "--other=1"], "other"),
    ],
)
def test_what_cannot_be_used_is_one_line(arguments, message):
    with pytest.raises(ConfigError, match=message) as error:
        config_from_arguments(arguments)
    assert "\n" not in str(error.value)
