"""The package as it is installed: its wheel holds all of it and nothing else, and works from any folder."""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import Distribution
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
from packaging.requirements import Requirement
from PIL import Image

from opendet_jax import __version__
from opendet_jax.data.scene_drawing import draw_scene
from tests.checkpoints.hub_server import serving

ROOT = Path(__file__).parents[1]
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "-q")
NUMBER = re.compile(r"\d+(?:\.\d+)?")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a folder that shows the repository: setuptools leaves its own files where it builds, and takes up old
    ones that lie there."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for path in ROOT.iterdir():
        if not path.name.startswith(".") and path.name != "build" and path.suffix != ".egg-info":
            (source / path.name).symlink_to(path)
    build = [*PIP, "wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", out, source]
    subprocess.run(build, check=True)
    [found] = out.iterdir()
    return found


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    site = tmp_path_factory.mktemp("site")
    subprocess.run([*PIP, "install", "--no-deps", "--no-index", "--target", site, wheel], check=True)
    return site


@pytest.fixture
def run(installed, tmp_path):
    """Runs a command in an empty folder, where the installed package comes before the repository's."""
    environment = {**os.environ, "PYTHONPATH": str(installed), "GLIBC_TUNABLES": ""}

    def execute(*command: str | Path, status: int = 0, **variables: str) -> tuple[str, str]:
        given = environment | variables
        settings = {"capture_output": True, "text": True, "timeout": 300, "cwd": tmp_path, "env": given}
        done = subprocess.run([sys.executable, "-P", *command], **settings)
        assert done.returncode == status, done.stderr
        return done.stdout, done.stderr

    return execute


def test_a_wheel_holds_the_package_with_configs_and_model_and_nothing_else(wheel):
    files = [path for path in (ROOT / "opendet_jax").rglob("*") if path.suffix == ".py"]
    files += [ROOT / "opendet_jax" / "py.typed", *(ROOT / "opendet_jax" / "models" / "scenes_tiny").iterdir()]
    expected = {path.relative_to(ROOT).as_posix(): path for path in files}
    expected |= {f"opendet_jax/configs/{path.name}": path for path in (ROOT / "configs").glob("*.py")}
    with ZipFile(wheel) as archive:
        about = {name for name in archive.namelist() if name.startswith(f"opendet_jax-{__version__}.dist-info/")}
        assert {name.partition("/")[2] for name in about} >= {"METADATA", "licenses/LICENSE"}
        assert set(archive.namelist()) - about == expected.keys()
        assert [name for name, path in expected.items() if archive.read(name) != path.read_bytes()] == []
    assert {"opendet_jax/configs/swin_t.py", "opendet_jax/models/scenes_tiny/model.safetensors"} <= expected.keys()


def test_what_it_says_of_itself(installed):
    [folder] = installed.glob("*.dist-info")
    about = Distribution.at(folder)
    assert (about.metadata["Name"], about.version) == ("opendet_jax", __version__)
    [command] = about.entry_points
    assert (command.group, command.name, command.value) == ("console_scripts", "opendet", "opendet_jax.main:opendet")
    wanted = [Requirement(line) for line in about.requires or ()]
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert {requirement for requirement in wanted if not requirement.marker} == {
        Requirement(line) for line in lines if not line.startswith("#")
    }


def test_the_readmes_first_lines_of_python_show_what_it_shows(run, installed, tmp_path):
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    place = next(place for place, (language, _) in enumerate(blocks) if language == "python")
    program, shown = blocks[place][1], blocks[place + 1][1]
    said, _ = run("-c", f"{program}\nprint(opendet_jax.__file__)")
    said, _, file = said.rstrip().rpartition("\n")
    assert Path(file) == installed / "opendet_jax" / "__init__.py"
    assert NUMBER.sub("", said) == NUMBER.sub("", shown.rstrip())
    numbers = [np.array(NUMBER.findall(text), float) for text in (said, shown)]
    # The last digit shown: hundredths of scores, pixels of boxes.
    assert np.all(np.abs(numbers[0] - numbers[1]) <= np.where(numbers[1] < 1, 0.0101, 1))
    with Image.open(tmp_path / "annotated.png") as annotated:
        assert annotated.size == (512, 512)  # 128 pixels made larger, until 480 are reached


def test_its_command_runs_from_anywhere(run, installed, tmp_path):
    opendet = installed / "bin" / "opendet"
    said, _ = run(opendet, "--help")
    assert "opendet predict " in said
    assert "scenes_tiny" in said
    assert "swin_t" in said
    assert run(opendet, "--version")[0].startswith(f"opendet_jax {__version__}")
    _, error = run(opendet, "train", "swin_s", status=1)  # which builds on its neighbour, swin_t
    assert error.startswith("error: config.data.train.annotations is empty")
    run(opendet, "show", "--config=scenes_tiny", "--out=sheet.png", "--images=2", "--config.data.scenes_train=4")
    assert (tmp_path / "sheet.png").is_file()


def test_prediction_on_a_folder_needs_no_config(run, installed, tmp_path):
    (tmp_path / "photos").mkdir()
    for index in range(2):
        Image.fromarray(draw_scene(99, "val", index, 128)[0]).save(tmp_path / "photos" / f"{index}.png")
    said, _ = run(installed / "bin" / "opendet", "predict", "photos", "--workdir=scenes_tiny")
    assert said.startswith("opendet_jax ")
    assert "2 images" in said
    assert {path.name for path in (tmp_path / "scenes_tiny" / "predict").iterdir()} == {
        "0.png",
        "1.png",
        "predictions.json",
    }


FOUND = """
import json, sys
sys.modules |= dict.fromkeys(sys.argv[1].split(","))  # what cannot be imported
import opendet_jax
found = {}("{}").detect("scene.png")
print(json.dumps([found.names, found.boxes.tolist(), found.scores.tolist()]))
"""


def test_from_a_hub_to_programs_that_need_no_flax(run, installed, tmp_path):
    """The hub's model, and the programs that are made of it there and run where what makes them is missing."""
    name, variables = "hf://me/scenes_tiny", {"HF_HOME": str(tmp_path / "home"), "no_proxy": "127.0.0.1,localhost"}
    Image.fromarray(draw_scene(99, "val", 0, 128)[0]).save(tmp_path / "scene.png")
    model = ROOT / "opendet_jax" / "models" / "scenes_tiny"
    with serving() as hub:
        hub.add("me/scenes_tiny", {path.name: path.read_bytes() for path in model.iterdir()})
        variables["HF_ENDPOINT"] = hub.address
        run(installed / "bin" / "opendet", "programs", name, "--out", "programs", **variables)
        said, _ = run("-c", FOUND.format("opendet_jax.load", name), "torch", **variables)
    names, *numbers = json.loads(said)
    hidden = "flax,optax,orbax,transformers,huggingface_hub"
    said, _ = run("-c", FOUND.format("opendet_jax.run_exported", "programs"), hidden)
    by_programs, *others = json.loads(said)
    assert len(names) > 0
    assert by_programs == names
    for numbers_of_both, tolerance in zip(zip(numbers, others, strict=True), (1e-3, 1e-5), strict=True):
        np.testing.assert_allclose(*numbers_of_both, rtol=0, atol=tolerance)  # pixels, and scores up to 1
