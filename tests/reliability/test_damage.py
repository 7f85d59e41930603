"""Checkpoints that are missing, incomplete or damaged: what is fallen back to, and what is said."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from opendet_jax.checkpoints.folder import Converted, load, save
from opendet_jax.checkpoints.intact import MANIFEST, steps
from opendet_jax.checkpoints.restore import find, restore
from opendet_jax.checkpoints.same_config import CheckpointError, check_same
from opendet_jax.config import config_hash
from opendet_jax.config_files import parse_config
from opendet_jax.errors import WeightsError
from opendet_jax.train.checkpoint import Checkpoints
from opendet_jax.train.training_loop import train
from tests.reliability.programs import assert_same_checkpoint, assert_same_run, template, tiny

CONFIG = tiny(steps=4)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Checkpoints of steps 2 and 4."""
    from tests.reliability import toy

    workdir = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        toy.install(patch.setattr)
        train(CONFIG, workdir)
    return workdir


@pytest.fixture
def workdir(trained, tmp_path) -> Path:
    """A copy to damage."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def files(checkpoint: Path) -> list[Path]:
    """Every file that holds something."""
    return sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.stat().st_size)


def cut(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def newest(workdir: Path) -> int:
    """The step that training would continue from."""
    checkpoints = Checkpoints(workdir, CONFIG)
    try:
        found = checkpoints.restore_newest(template(CONFIG))
    finally:
        checkpoints.close()
    assert found is not None
    return int(found[0].step)


@pytest.mark.parametrize("damage", [cut, flip, Path.unlink])
@pytest.mark.parametrize("item", ["params", "opt_state", "iterator", "config", "run", MANIFEST])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(workdir, damage, item, caplog):
    """Whichever of its files it is."""
    path = workdir / "checkpoints" / "4" / item
    damage(path if path.is_file() else max(files(path), key=lambda file: file.stat().st_size))
    assert newest(workdir) == 2
    assert "falling back to the checkpoint before it" in caplog.text
    if (damage, item) != (flip, MANIFEST):  # a checksum that has changed accuses the file it is of
        assert item in caplog.text
    assert (workdir / "checkpoints" / "4.damaged1").is_dir(), "kept, out of the way"


def test_any_byte_of_any_file(trained, tmp_path):
    """What is flipped is found, or has no part in what is restored."""
    for number, path in enumerate(files(trained / "checkpoints" / "4")):
        workdir = tmp_path / str(number)
        shutil.copytree(trained / "checkpoints", workdir / "checkpoints")
        flip(workdir / path.relative_to(trained))
        if newest(workdir) == 4:
            assert path.name in ("_CHECKPOINT_METADATA", "commit_success.txt")
            assert_same_checkpoint(workdir, trained, 4, CONFIG)
        shutil.rmtree(workdir)


def test_training_goes_on_past_a_damaged_checkpoint(workdir, trained, capsys):
    """And saves the step of the damaged one anew."""
    flip(max(files(workdir / "checkpoints" / "4" / "params"), key=lambda file: file.stat().st_size))
    train(CONFIG, workdir)
    assert "continuing from step 2" in capsys.readouterr().out
    assert_same_run(workdir, trained, 4, CONFIG)


def test_inference_falls_back_too(workdir, caplog):
    flip(max(files(workdir / "checkpoints" / "4" / "params"), key=lambda file: file.stat().st_size))
    assert restore(workdir)[2] == 2
    assert "falling back" in caplog.text
    assert (workdir / "checkpoints" / "4").is_dir(), "reading changes nothing"


def test_inference_reads_what_it_needs_of_a_damaged_checkpoint(workdir):
    """A broken optimizer state is none of its business."""
    shutil.rmtree(workdir / "checkpoints" / "4" / "opt_state")
    assert restore(workdir)[2] == 4


def test_a_step_that_was_asked_for_is_never_replaced(workdir):
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 3 in .*; there are 2, 4"):
        find(workdir, 3)
    flip(max(files(workdir / "checkpoints" / "2" / "params"), key=lambda file: file.stat().st_size))
    with pytest.raises(CheckpointError, match=r"checkpoints/2/params/.*: is damaged"):
        restore(workdir, 2)
    checkpoints = Checkpoints(workdir, CONFIG)
    with pytest.raises(CheckpointError, match=r"checkpoints/2/params/.*: is damaged"):
        checkpoints.restore(template(CONFIG), 2)
    checkpoints.close()


def test_when_all_are_damaged_training_does_not_begin_anew(workdir):
    for step in (2, 4):
        cut(workdir / "checkpoints" / str(step) / MANIFEST)
    with pytest.raises(CheckpointError, match="every checkpoint is damaged"):
        restore(workdir)
    log = (workdir / "metrics.jsonl").read_bytes()
    for _ in range(2):  # whoever starts it again, a person or a scheduler, finds the same
        with pytest.raises(CheckpointError, match="every checkpoint is damaged"):
            train(CONFIG, workdir)
    assert steps(workdir / "checkpoints") == [2, 4]
    assert (workdir / "metrics.jsonl").read_bytes() == log != b""


def test_a_save_that_was_cut_off_is_ignored_and_reported(workdir, trained, caplog):
    checkpoints = workdir / "checkpoints"
    (checkpoints / "4").rename(checkpoints / "4.orbax-checkpoint-tmp")
    assert restore(workdir)[2] == 2
    assert "4.orbax-checkpoint-tmp: a save that goes on, or was cut off; ignored" in caplog.text
    assert newest(workdir) == 2
    assert "4.orbax-checkpoint-tmp: a save that was cut off; ignored and removed" in caplog.text
    assert not (checkpoints / "4.orbax-checkpoint-tmp").exists()


def test_a_checkpoint_of_an_earlier_version_has_nothing_to_compare(workdir):
    """It has neither checksums nor a note of the run."""
    checkpoint = workdir / "checkpoints" / "4"
    (checkpoint / MANIFEST).unlink()
    shutil.rmtree(checkpoint / "run")
    assert newest(workdir) == 4
    assert restore(workdir)[2] == 4


def test_converted_weights_are_verified(tmp_path):
    params = {"kernel": np.arange(5000, dtype=np.float32)}
    save(tmp_path, Converted("swin", {"embed_dim": 8}, params), {})
    np.testing.assert_array_equal(load(tmp_path, "swin").params["kernel"], params["kernel"])
    flip(max(files(tmp_path / "checkpoints" / "0" / "params"), key=lambda file: file.stat().st_size))
    with pytest.raises(WeightsError, match="what it holds is damaged"):
        load(tmp_path, "swin")


def test_weights_are_not_a_run_that_can_go_on(tmp_path, trained):
    _, params, _ = restore(trained)
    save(tmp_path, Converted("opendet", CONFIG.to_dict(), params), {})
    with pytest.raises(CheckpointError, match=r"holds weights, not a run .* --config\.init\.model="):
        train(CONFIG, tmp_path)


def test_another_config_is_named_field_by_field(workdir):
    """Everything that changes a number of the run binds it; where things lie and how often they are saved does not."""
    other = replace(
        CONFIG,
        train=replace(CONFIG.train, seed=1, steps=9, checkpoint_every=7),
        optimizer=replace(CONFIG.optimizer, clip_norm=0.5),
        data=replace(CONFIG.data, threads=1, batch_size=4, train=replace(CONFIG.data.train, images="elsewhere")),
    )
    with pytest.raises(CheckpointError, match="was made by another config") as error:
        train(other, workdir)
    found = [line.split(":")[0].strip() for line in str(error.value).splitlines()[1:]]
    assert found == ["data.batch_size", "optimizer.clip_norm", "train.seed"]
    assert "train.seed: checkpoint 0, config 1" in str(error.value)
    assert isinstance(config_hash(parse_config(CONFIG.to_dict())), str)


def test_images_that_were_held_out_stay_out(tmp_path):
    """Whether there is a json to evaluate on decides what is trained on."""
    data = replace(CONFIG.data, source="json", held_out=0.25)
    held_out = replace(CONFIG, data=data)
    elsewhere = replace(CONFIG, data=replace(data, eval=replace(data.eval, annotations="val.json")))
    with pytest.raises(CheckpointError, match=r"held_out \(where data.eval names no json\): checkpoint 0.25, config 0"):
        check_same(held_out.to_dict(), elsewhere, tmp_path)
    moved = replace(elsewhere, data=replace(elsewhere.data, eval=replace(data.eval, annotations="there/val.json")))
    check_same(elsewhere.to_dict(), moved, tmp_path)
