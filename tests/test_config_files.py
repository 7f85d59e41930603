"""Configs as arguments of the smaller commands."""

from dataclasses import replace

import pytest

from opendet_jax.config import Config, ConfigError, DatasetPaths
from opendet_jax.config_files import check_paths, config_from_arguments

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
        ([], r"--config is missing: name a file of configs/ \(evaluation and prediction: or --workdir\)"),
        (
            ["--config=configs/none.py"],
            r"--config=configs/none\.py: there is no file configs/none\.py, .*, scenes_tiny, ",
        ),
        (["--config=configs/minilvis.py:some"], r"^configs/minilvis\.py:some does not exist; there is"),
        (
            ["--config=configs/minilvis.py", "--config.data.batchsize=3"],
            r"does not exist: batchsize; did you mean batch_size\?$",
        ),
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


@pytest.fixture
def config(tmp_path) -> Config:
    """All that it names is there."""
    for name in ("a.json", "table.npy", "step_3.npz"):
        (tmp_path / name).touch()
    (tmp_path / "photos").mkdir()
    paths = DatasetPaths(str(tmp_path / "a.json"), str(tmp_path / "photos"))
    table = {"text_embeddings": "table", "text_table": str(tmp_path / "table.npy")}
    base = Config()
    return replace(
        base,
        data=replace(base.data, train=paths, mixture=(paths,), eval=paths, **table),
        train=replace(base.train, replay=str(tmp_path / "step_3.npz")),
        eval=replace(base.eval, name_mapping="text_encoder", text_encoder=str(tmp_path)),
        predict=replace(base.predict, inputs="*.jpg"),
    )


MODES = ("train", "eval", "predict", "replay")


def test_paths_that_are_there(config, tmp_path):
    for mode in MODES:
        check_paths(config, mode)
    prepared = DatasetPaths(str(tmp_path / "photos"))
    check_paths(replace(config, data=replace(config.data, train=prepared, eval=prepared)), "train")
    (tmp_path / "data.yaml").touch()
    for annotations in ("data.yaml", "data.yaml:test", "photos:val"):
        paths = DatasetPaths(str(tmp_path / annotations))
        check_paths(replace(config, data=replace(config.data, train=paths, eval=paths)), "train")


@pytest.mark.parametrize(
    ("section", "field", "value", "modes"),
    [
        ("data", "train", DatasetPaths("none.json", "."), ["train"]),
        ("data", "train", DatasetPaths(__file__, "none"), ["train"]),
        ("data", "train", DatasetPaths(__file__, ""), ["train"]),
        ("data", "train", DatasetPaths(), ["train"]),
        ("data", "train", DatasetPaths(f"{__file__}:train", ""), ["train"]),
        ("data", "train", DatasetPaths(f"{__file__}.none:train", "."), ["train"]),
        ("data", "mixture", (DatasetPaths("none.json"),), ["train"]),
        ("data", "eval", DatasetPaths("none.json"), ["train", "eval"]),
        ("data", "eval", DatasetPaths(__file__, __file__), ["train", "eval"]),
        ("data", "text_table", "none.npy", ["train"]),
        ("eval", "text_encoder", "none", ["train", "eval"]),
        ("train", "replay", "none.npz", ["replay"]),
        ("train", "replay", "", ["replay"]),
        ("predict", "inputs", "", ["predict"]),
    ],
)
def test_paths_that_are_not_there(config, section, field, value, modes):
    """In the modes that need them; the field is named."""
    wrong = replace(config, **{section: replace(getattr(config, section), **{field: value})})
    for mode in MODES:
        if mode in modes:
            with pytest.raises(ConfigError, match=rf"^config\.{section}\.{field}"):
                check_paths(wrong, mode)
        else:
            check_paths(wrong, mode)


def test_what_is_held_out_is_read_from_the_training_data(config):
    data = replace(config.data, train=DatasetPaths("none.json", "."), eval=DatasetPaths())
    with pytest.raises(ConfigError, match=r"config\.data\.train\.annotations = 'none\.json'"):
        check_paths(replace(config, data=data), "eval")
    check_paths(replace(config, data=replace(data, source="scenes")), "eval")
