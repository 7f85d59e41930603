"""Programs of the model that comes along: what they find, what they need, and what is said where they cannot run."""

import errno
import json
import re
import subprocess
import sys
from dataclasses import replace

import jax.export
import numpy as np
import pytest
from PIL import Image

import opendet_jax
from opendet_jax import exported
from opendet_jax.batch import Images
from opendet_jax.checkpoints import intact
from opendet_jax.config import Config
from opendet_jax.data import tokenizer as tokenizers
from opendet_jax.data.scene_drawing import draw_scene
from opendet_jax.exported import NAMING, PARAMETERS, PROGRAMS, TOKENIZER, file_of, main
from opendet_jax.inference import Selection
from tests.test_dependencies import ROOT, modules_of, required

DETECTING = file_of((128, 128))
# Of what the package requires, all that programs need: docs/export.md.
ALONE = {"absl-py", "jax", "jaxtyping", "ml_collections", "numpy", "pillow", "pyyaml", "safetensors", "scipy", "tqdm"}
CLOSE = 1e-5  # of numbers up to 1: what XLA's other order of the same sums may change, many times over


def write(out, *options):
    """In a process without the type checks of the tests, for which a number of images that is any number is no int."""
    command = [sys.executable, "-m", "opendet_jax.exported", "scenes_tiny", "--out", str(out), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"wrote {out}: " in done.stdout
    return out


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    return write(tmp_path_factory.mktemp("exported") / "programs")


@pytest.fixture(scope="module")
def checkpoint():
    return opendet_jax.load("scenes_tiny")


@pytest.fixture
def copied(programs, tmp_path):
    """A folder to do harm to."""
    folder = tmp_path / "copied"
    folder.mkdir()
    for file in programs.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture
def quickly(monkeypatch):
    """Writing takes no time, and the programs are none."""
    monkeypatch.setattr(exported, "_export", lambda _: b"no program")


def refused(arguments) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(list(map(str, arguments)))
    return str(stopped.value)


def scene(index, size=(128, 128)):
    pixels, _ = draw_scene(seed=7, split="val", index=index, size=128)
    return np.asarray(Image.fromarray(pixels).resize(size))


def test_they_find_what_the_checkpoint_finds_without_what_training_needs(programs, checkpoint, tmp_path):
    hidden = modules_of(required()) - modules_of(ALONE)
    assert {"flax", "optax", "orbax", "transformers", "grain", "tensorflow_datasets", "tokenizers"} <= hidden
    pictures = []
    for index, size in enumerate([(128, 128), (96, 160), (300, 200), (50, 400)]):
        pictures.append(tmp_path / f"{index}.png")
        Image.fromarray(scene(index, size)).save(pictures[-1])
    done = subprocess.run(
        [sys.executable, "-m", "tests.without_packages", str(programs), *sorted(hidden)],
        input="\n".join(map(str, pictures)),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for picture, (boxes, scores, *names, name_scores) in zip(pictures, json.loads(done.stdout), strict=True):
        wanted = checkpoint.detect(picture, min_score=0.0)
        with Image.open(picture) as image:
            sides = np.array([*image.size, *image.size])
        assert len(wanted) > 0
        assert names == [wanted.names, wanted.alternatives]
        np.testing.assert_allclose(boxes / sides, wanted.boxes / sides, atol=CLOSE, rtol=0)
        np.testing.assert_allclose(scores, wanted.scores, atol=CLOSE, rtol=0)
        np.testing.assert_allclose(name_scores, wanted.name_scores, atol=CLOSE, rtol=CLOSE)


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    """Programs for two images at once."""
    return write(tmp_path_factory.mktemp("exported") / "programs", "--batch_size", "2")


@pytest.mark.parametrize("which", ["programs", "of_two"])
def test_any_number_of_images(which, request, checkpoint):
    """At once, or two at a time with a copy of the last beside it; each as the checkpoint finds it alone."""
    detector = opendet_jax.run_exported(request.getfixturevalue(which))
    pixels, mask = np.stack([scene(index) for index in range(3)]), np.ones((3, 128, 128), bool)
    mask[1, :, 96:], pixels[1, :, 96:] = False, 0
    selection = Selection(100, 0.0, 0.5)
    found = detector._inference._detect(Images(pixels, mask), 3, selection, None)[:4]
    for index in range(3):
        one = slice(index, index + 1)
        alone = checkpoint._inference._detect(Images(pixels[one], mask[one]), 1, selection, None)[:4]
        for theirs, wanted in zip(found, alone, strict=True):
            assert len(theirs) >= 3
            np.testing.assert_allclose(theirs[one], wanted, atol=CLOSE * np.abs(wanted).max(), rtol=0)
    with pytest.raises(exported.ProgramError, match=r"^names: exported programs make names up"):
        detector.detect(pixels[0], names=["red star"])


def test_what_is_in_the_folder(programs):
    about = json.loads((programs / PROGRAMS).read_text())
    assert {path.name for path in programs.iterdir()} == {DETECTING, NAMING, PARAMETERS, PROGRAMS, intact.MANIFEST}
    assert about["jax"] == jax.__version__
    assert about["config"]["name"] == "scenes_tiny"
    assert about["programs"][DETECTING]["inputs"] == {
        "pixels": "uint8[b,128,128,3]",
        "mask": "bool[b,128,128]",
        "nms_iou": "float32[]",
        "nms_above": "int32[]",
    }
    for file in (DETECTING, NAMING):
        content = (programs / file).read_bytes()
        program, said = jax.export.deserialize(bytearray(content)), about["programs"][file]
        assert program.platforms == ("cpu", "cuda", "tpu")
        text = program.mlir_module()
        assert set(re.findall(r"custom_call @([\w.]+)", text)) == {"shape_assertion"}  # no kernels
        assert f"{ROOT}/opendet_jax".encode() not in content  # no places of source files
        count = len(said["parameters"]) + len(said["inputs"])
        assert len(program.in_avals) == count
        assert len(program.out_avals) == len(said["outputs"])
        # Every one of them is used, and none is of training alone. An argument more says which platform it is.
        body = text.partition("func.func public @main(")[2].partition(" {\n")[2].partition("\n  }\n")[0]
        assert {int(number) for number in re.findall(r"%arg(\d+)\b", body)} >= set(range(1 + count))


def test_fixed_shapes_are_said(of_two):
    about = json.loads((of_two / PROGRAMS).read_text())
    assert about["batch_size"] == 2
    assert about["programs"][DETECTING]["inputs"]["mask"] == "bool[2,128,128]"
    assert about["programs"][NAMING]["inputs"] == {"prompts": "float32[10,128]"}
    assert "custom_call" not in jax.export.deserialize(bytearray((of_two / NAMING).read_bytes())).mlir_module()


def test_damage_is_found(copied):
    content = bytearray((copied / NAMING).read_bytes())
    content[1000] ^= 1
    (copied / NAMING).write_bytes(content)
    with pytest.raises(intact.DamagedError, match=rf"{NAMING}: is damaged: it is not what was written$"):
        opendet_jax.run_exported(copied)
    (copied / DETECTING).unlink()
    with pytest.raises(intact.DamagedError, match=rf": {DETECTING} is missing$"):
        opendet_jax.run_exported(copied)
    (copied / PROGRAMS).unlink()
    with pytest.raises(exported.ProgramError, match=r"copied: holds no exported programs; opendet programs DIR --out"):
        opendet_jax.run_exported(copied)
    with pytest.raises(exported.ProgramError, match=r"\(there is no such folder\)"):
        opendet_jax.run_exported(copied / "nowhere")


@pytest.mark.parametrize(
    "change", [lambda content: b"no program", lambda content: content.replace(b"StableHLO_v", b"x")]
)
def test_a_program_that_this_jax_cannot_read(copied, change):
    content = (copied / NAMING).read_bytes()
    (copied / NAMING).write_bytes(change(content))
    assert (copied / NAMING).read_bytes() != content
    intact.write_manifest(copied)
    with pytest.raises(exported.ProgramError) as refusal:
        opendet_jax.run_exported(copied)
    said = str(refusal.value)
    assert f"{NAMING}: jax {jax.__version__} cannot read it; jax {jax.__version__} wrote it" in said
    assert "6 months newer or 3 weeks older" in said
    assert "\n" not in said


def test_another_platform_and_missing_packages(programs, monkeypatch):
    monkeypatch.setattr(jax.export, "default_export_platform", lambda: "rocm")
    with pytest.raises(exported.ProgramError, match=r"are for cpu, cuda, tpu, and this machine's platform is rocm$"):
        opendet_jax.run_exported(programs)
    monkeypatch.setattr(exported, "find_spec", lambda name: None)
    with pytest.raises(exported.ProgramError, match=r"need the package flatbuffers: pip install flatbuffers$"):
        opendet_jax.run_exported(programs)
    assert "need the package flatbuffers" in refused(["scenes_tiny", "--out", programs.parent / "other"])
    assert not (programs.parent / "other").exists()


def test_nothing_is_written_over(tmp_path, quickly):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("mine")
    for name in ("file", "folder"):
        assert refused(["scenes_tiny", "--out", tmp_path / name]).endswith(": is there already; give another folder")
    assert refused(["scenes_tiny", "--out", tmp_path / "file" / "below"]).startswith("error: ")
    assert "no checkpoint in" in refused([tmp_path / "nowhere", "--out", tmp_path / "out"])
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "file", "folder"]


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "out: cannot be written: No space left on device"),
        (KeyboardInterrupt(), "stopped; nothing is written"),
    ],
)
@pytest.mark.parametrize("there", [True, False])
def test_all_or_nothing(tmp_path, quickly, monkeypatch, raised, said, there):
    def fail(*_, **__):
        raise raised

    out = tmp_path / "new" / "out"
    if there:
        out.mkdir(parents=True)
    monkeypatch.setattr(exported, "save_file", fail)
    assert said in refused(["scenes_tiny", "--out", out])
    assert list((tmp_path / "new").iterdir()) == [out] * there


def test_an_empty_folder_is_filled(tmp_path, quickly):
    out = tmp_path / "out"
    out.mkdir()
    main(["scenes_tiny", "--out", str(out)])
    assert (out / NAMING).read_bytes() == b"no program"
    assert (out / PARAMETERS).stat().st_mode & 0o777 == (out / PROGRAMS).stat().st_mode & 0o777
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("by_transformers", [False, True])
def test_a_t5s_tokenizer_comes_along(data_folder, tmp_path, monkeypatch, by_transformers):
    source, folder = str(data_folder / "tokenizers" / "t5"), tmp_path / TOKENIZER
    config = replace(Config(), data=replace(Config().data, tokenizer=source))
    theirs = tokenizers.load_tokenizer(source, 32128)
    if by_transformers:  # as where only a name on the hub is given
        theirs = tokenizers._pretrained(source, download=False)
        monkeypatch.setattr(
            exported, "load_tokenizer", lambda name, size: theirs if name == source else tokenizers._t5(folder)
        )
    exported._write_tokenizer(config, folder)
    ours = tokenizers.load_tokenizer(str(folder), 32128)
    assert isinstance(ours, tokenizers.T5Tokenizer)
    tokens = theirs.encode("a jar , of pickles")
    assert ours.decode([0, *tokens, 1, 0]) == theirs.decode([0, *tokens, 1, 0]) == "a jar, of pickles"


def test_a_tokenizer_that_only_transformers_reads_is_refused(data_folder, tmp_path, monkeypatch):
    source = str(data_folder / "tokenizers" / "t5")
    config = replace(Config(), data=replace(Config().data, tokenizer=source))
    theirs = tokenizers._pretrained(source, download=False)
    monkeypatch.setattr(exported, "load_tokenizer", lambda name, size: theirs)
    with pytest.raises(tokenizers.TokenizerError, match="cannot be read without transformers"):
        exported._write_tokenizer(config, tmp_path / TOKENIZER)


PAPERS = """
import jax
from configs.swin_t import get_config
from flax.traverse_util import flatten_dict
from opendet_jax import exported
from opendet_jax.config_files import parse_config
from opendet_jax.model.opendet import OpenDet, init_params

config = parse_config(get_config())
model = OpenDet(config.model, config.ablation)
params = flatten_dict(jax.eval_shape(lambda: init_params(model, jax.random.key(0))), sep="/")
params = {name: leaf for name, leaf in params.items() if not name.startswith(exported.TRAINING)}
print(sum(leaf.size * 4 for leaf in params.values()) / 2**20)
for file, written in exported._programs(config, params, None).items():
    print(file, len(exported._export(written)) / 2**20)
"""


@pytest.mark.slow
def test_the_papers_model():
    """Of its shapes alone: no number of it is needed to write its programs."""
    done = subprocess.run([sys.executable, "-c", PAPERS], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    parameters, *files = done.stdout.splitlines()
    assert 1200 < float(parameters) < 1300
    assert [line.split()[0] for line in files] == [
        *map(file_of, ((800, 1344), (1344, 800), (1088, 1088))),
        NAMING,
    ]
    assert all(float(line.split()[1]) < 2 for line in files)
