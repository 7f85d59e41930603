"""What a checkpoint holds, when it appears, which ones stay, and where they can be restored."""

import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from opendet_jax.checkpoints import intact
from opendet_jax.checkpoints.intact import MANIFEST, steps
from opendet_jax.checkpoints.same_config import CheckpointError
from opendet_jax.config import ConfigError, config_hash
from opendet_jax.config_files import validate
from opendet_jax.errors import InputError
from opendet_jax.train.checkpoint import Checkpoints
from opendet_jax.train.run import Run
from opendet_jax.train.training_loop import train
from tests.reliability.programs import PATIENCE, free_port, restored, template, tiny

CONFIG = tiny(steps=4)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    from tests.reliability import toy

    workdir = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        toy.install(patch.setattr)
        train(replace(CONFIG, train=replace(CONFIG.train, ema=0.9)), workdir)
    return workdir


def test_everything_is_in_it(trained):
    """Parameters, their average, optimizer, step, PRNG, data iterator, config and its hash; a checksum of each file."""
    folder = trained / "checkpoints" / "4"
    items = {"params", "opt_state", "average", "iterator", "config", "run"}
    assert {path.name for path in folder.iterdir() if path.is_dir()} == items
    config = replace(CONFIG, train=replace(CONFIG.train, ema=0.9))
    note = json.loads((folder / "run" / "metadata").read_text())
    key = np.asarray(jax.random.key_data(jax.random.key(0))).tolist()
    assert note == {
        "step": 4,
        "refused": 0,
        "config_hash": config_hash(config),
        "prng": {"generator": "threefry2x32", "key": key},
    }
    assert json.loads((folder / "config" / "metadata").read_text()) == json.loads(json.dumps(config.to_dict()))
    sums = json.loads((folder / MANIFEST).read_text())
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files - sums.keys() == {MANIFEST, "_CHECKPOINT_METADATA", "commit_success.txt"}
    state, iterator_state = restored(trained, 4, config)
    assert iterator_state
    assert not np.array_equal(state.average["decoder"]["bias"], state.params["decoder"]["bias"])


def test_the_hash_stands_for_every_value():
    assert config_hash(CONFIG) == config_hash(tiny(steps=4))
    assert config_hash(CONFIG) != config_hash(tiny(steps=5))
    assert len(config_hash(CONFIG)) == 12


def test_random_numbers_of_another_kind(trained):
    """The same seed with another generator is another run."""
    config = replace(CONFIG, train=replace(CONFIG.train, ema=0.9))
    with jax.default_prng_impl("rbg"), pytest.raises(CheckpointError, match=r"its random numbers are .*threefry2x32"):
        restored(trained, 4, config)


def test_saving_is_asynchronous_and_atomic(tmp_path, monkeypatch):
    """`save` returns while files are still being written, the state may change; nothing is there until all is."""
    write, may_end = intact.write_manifest, threading.Event()

    def write_late(checkpoint: Path) -> None:
        assert may_end.wait(PATIENCE)
        write(checkpoint)

    run = Run(CONFIG, tmp_path)
    run.take_step()
    before = jax.device_get(run.state)
    monkeypatch.setattr(intact, "write_manifest", write_late)
    run.save()
    run.take_step()  # reuses the memory of the state that is being saved
    assert steps(tmp_path / "checkpoints") == []
    assert intact.unfinished(tmp_path / "checkpoints")
    may_end.set()
    run.checkpoints.close()
    run.close()
    assert steps(tmp_path / "checkpoints") == [1]
    jax.tree.map(np.testing.assert_array_equal, restored(tmp_path, 1, CONFIG)[0], before)


def test_the_best_and_the_newest_stay(tmp_path, capsys):
    """The best of all evaluations, however old it is; every evaluation has a checkpoint of its step."""
    config = tiny(steps=12, eval_every=1, checkpoint_every=5, keep_checkpoints=2)
    train(config, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "evaluations.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert steps(tmp_path / "checkpoints") == [7, 11, 12]
    assert f"best AP: step 7, kept in {tmp_path}/checkpoints/7" in capsys.readouterr().out
    train(replace(config, train=replace(config.train, steps=14, keep_best="")), tmp_path)
    assert steps(tmp_path / "checkpoints") == [13, 14]


def test_keep_best_must_be_a_metric(tmp_path):
    with pytest.raises(InputError, match=r"train\.keep_best = 'mAP': the evaluation has AP, rising"):
        train(tiny(steps=1, keep_best="mAP"), tmp_path)
    assert steps(tmp_path / "checkpoints") == [1]
    with pytest.raises(ConfigError, match=r"train\.keep_checkpoints = 0: must be at least 1"):
        validate(tiny(keep_checkpoints=0))


def on_mesh(mode: str, folder: Path, *sizes: int, processes: int = 1) -> list[str]:
    """tests/reliability/on_meshes.py on 4 devices; what each process prints."""
    port = free_port()
    command = [sys.executable, "-m", "tests.reliability.on_meshes", mode, str(folder), *map(str, sizes)]
    environment = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={4 // processes}"}
    started = [
        subprocess.Popen(
            [*command, *([str(processes), str(number), f"localhost:{port}"] if processes > 1 else [])],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for number in range(processes)
    ]
    ended = [process.communicate(timeout=PATIENCE) for process in started]
    for process, (_, err) in zip(started, ended, strict=True):
        assert process.returncode == 0, err
    return [out.strip().splitlines()[-1] for out, _ in ended]  # gloo says something before


@pytest.mark.slow
def test_restored_onto_other_meshes_and_numbers_of_processes(tmp_path):
    """Saved by two processes in four parts; restored by one, by two, whole, and in parts of another kind."""
    on_mesh("save", tmp_path, 1, 4, 1, processes=2)
    assert on_mesh("restore", tmp_path, 4, 1, 1) == [f"restore {[(16, 384)] * 4}"]
    assert on_mesh("restore", tmp_path, 1, 2, 2, processes=2) == [f"restore {[(8, 192)] * 2}"] * 2
    config = tiny(ema=0.9)
    checkpoints = Checkpoints(tmp_path, config, read_only=True)
    state, _ = checkpoints.restore(template(config), 3)
    checkpoints.close()
    assert len(state.params["decoder"]["bias"].devices()) == 1
