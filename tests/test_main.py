"""The program from the keyboard: commands, and configs by name, from any folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from opendet_jax.config import ConfigError
from opendet_jax.config_files import CONFIGS, config_from_arguments, find_config
from opendet_jax.main import COMMANDS, FLAGS_OF, HELP, flags_of, with_config

ROOT = Path(__file__).parents[1]
CALL = "import sys; from opendet_jax.main import opendet; sys.exit(opendet())"


def opendet(*arguments: str, folder: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GLIBC_TUNABLES": ""}
    command = [sys.executable, "-P", "-c", CALL, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=folder, env=environment)


def test_help_names_every_command():
    for command in (*FLAGS_OF, *COMMANDS):
        assert f"opendet {command} " in HELP


@pytest.mark.parametrize(
    ("command", "arguments", "flags"),
    [
        ("train", ["swin_t:scenes"], ["--mode=train", "--config=swin_t:scenes"]),
        (
            "train",
            ["--workdir", "runs/a", "mine.py", "--config.train.steps=3"],
            ["--mode=train", "--config=mine.py", "--workdir=runs/a", "--config.train.steps=3"],
        ),
        ("eval", ["--workdir=runs/a"], ["--mode=eval", "--workdir=runs/a"]),
        (
            "predict",
            ["a.jpg", "b c.jpg", "--workdir=runs/a"],
            ["--mode=predict", "--workdir=runs/a", "--config.predict.inputs=a.jpg\nb c.jpg"],
        ),
    ],
)
def test_what_stands_alone(command, arguments, flags):
    assert flags_of(command, arguments) == flags


def test_fields_come_after_the_config_that_has_them(tmp_path):
    done = opendet("train", "--config.train.steps=0", "scenes_tiny", folder=tmp_path)
    assert done.stderr.strip() == "error: config.train.steps = 0: must be at least 1"
    done = opendet("predict", "nothing.jpg", "--config=scenes_tiny", "--config.predict.min_score=2", folder=tmp_path)
    assert "error: config.predict.min_score = 2.0: must be between 0 and 1" in done.stderr


def test_two_configs():
    with pytest.raises(SystemExit, match="opendet train: what is 'swin_s'"):
        flags_of("train", ["swin_t", "swin_s"])


def test_the_config_of_a_model_is_meant_where_none_is_named():
    assert with_config(["main", "--mode=eval", "--workdir=runs/a"]) == [
        "main",
        f"--config={CONFIGS}/trained.py:runs/a",
        "--mode=eval",
        "--workdir=runs/a",
    ]
    for given in (
        ["main", "--mode=train", "--workdir=runs/a"],
        ["main", "--workdir", "runs/a"],
        ["main", "--mode=eval", "--workdir=runs/a", "--config=x.py", "--config.eval.limit=3"],
        ["main", "--mode=predict"],
    ):
        assert with_config(given) == given


def test_a_config_by_its_name(tmp_path, monkeypatch):
    for name in ("swin_t", "swin_t.py", "configs/swin_t.py"):
        monkeypatch.chdir(tmp_path)
        assert find_config(name) == str(CONFIGS / "swin_t.py")
        assert find_config(f"{name}:scenes") == f"{CONFIGS / 'swin_t.py'}:scenes"
    (tmp_path / "swin_t.py").write_text("mine")
    assert find_config("swin_t.py") == "swin_t.py"
    for missing in ("other/swin_t.py", "swin_x", "swin_t.json"):
        with pytest.raises(ConfigError, match=f"--config={missing}: there is no file {missing}.*, swin_t"):
            find_config(missing)


def test_a_config_of_ones_own_builds_on_ours_and_on_its_neighbours(tmp_path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "base.py").write_text("STEPS = 7\n")
    (tmp_path / "mine.py").write_text(
        "from configs import base, swin_s\n\n\ndef get_config():\n    config = swin_s.get_config()\n"
        "    config.train.steps = base.STEPS\n    config.name = 'mine'\n    return config\n"
    )
    read = (
        "from opendet_jax.config_files import config_from_arguments as read; "
        "c = read(['--config=mine.py']); print(c.name, c.train.steps, c.model.backbone.depths)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    # As a console command: the folder is not where Python looks for modules.
    command = [sys.executable, "-P", "-c", read]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=True)
    assert done.stdout.split("\n")[0] == "mine 7 (2, 2, 18, 2)"


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # how ml_collections loads a config file
def test_fields_of_a_config_by_name():
    assert config_from_arguments(["--config=scenes_tiny", "--config.train.steps=5"]).train.steps == 5


def test_a_wrong_command_or_config(tmp_path):
    done = opendet("predikt", folder=tmp_path)
    assert (done.returncode, done.stderr.strip()) == (1, "error: there is no command 'predikt'; did you mean predict?")
    done = opendet("train", "swin_x", folder=tmp_path)
    assert done.stderr.startswith("error: --config=swin_x: there is no file swin_x")
    assert "Traceback" not in done.stderr
    done = opendet("eval", "--workdir=nowhere", folder=tmp_path)
    assert done.stderr.strip() == "error: no checkpoint in nowhere/checkpoints"
    assert "Traceback" not in done.stderr
