"""N steps, stop, a new process, N steps: bitwise the same as 2N steps. On other devices too it goes on."""

from pathlib import Path

import numpy as np
import pytest

from opendet_jax.checkpoints.intact import steps
from opendet_jax.config import Config
from opendet_jax.config_files import parse_config
from tests.reliability.programs import (
    WHOLE,
    assert_same_run,
    finish,
    logged,
    restored,
    run_well,
    start_processes,
)
from tests.reliability.tiny import get_config

FEWER, ALL, FOUR = "train.steps=3", "train.steps=6", "data.batch_size=4"


def config_of(*overrides: str) -> Config:
    """Those of the command line."""
    values = get_config()
    for override in overrides:
        name, value = override.split("=")
        section, field = name.split(".")
        kind = type(values[section][field])
        values[section][field] = kind(value)
    return parse_config(values)


def test_half_and_half_is_the_whole(tmp_path):
    """With threads that read ahead, with batches in parts and a moving average."""
    overrides = ("data.threads=3", "data.prefetch=5", "train.accumulate=2", "train.ema=0.9")
    run_well(tmp_path / "parts", FEWER, *overrides)
    assert "continuing from step 3 of" in run_well(tmp_path / "parts", ALL, *overrides)
    run_well(tmp_path / "whole", ALL, *overrides)
    assert_same_run(tmp_path / "parts", tmp_path / "whole", 6, config_of(ALL, *overrides))


def both(workdir: Path, *overrides: str, **given: str) -> None:
    """Two processes of two devices, an image on each."""
    devices = "--xla_force_host_platform_device_count=2"
    for process in start_processes(workdir, 2, *overrides, FOUR, XLA_FLAGS=devices, **given):
        done = finish(process)
        assert done.status == 0, done.err


def test_with_two_processes(tmp_path):
    """Bitwise too; and on one process a run of two goes on where it was."""
    both(tmp_path / "parts", FEWER)
    both(tmp_path / "parts", ALL)
    both(tmp_path / "whole", ALL)
    assert_same_run(tmp_path / "parts", tmp_path / "whole", 6, config_of(ALL, FOUR))
    out = run_well(tmp_path / "parts", "train.steps=8", FOUR)
    assert "continuing from step 6 of" in out
    run_well(tmp_path / "alone", "train.steps=8", FOUR)
    config = config_of("train.steps=8", FOUR)
    (mixed, mixed_data), (alone, alone_data) = (restored(tmp_path / name, 8, config) for name in ("parts", "alone"))
    assert mixed_data == alone_data
    for left, right in zip(logged(tmp_path / "parts"), logged(tmp_path / "alone"), strict=True):
        assert left["total"] == pytest.approx(right["total"], rel=1e-4)
    np.testing.assert_allclose(mixed.params["decoder"]["bias"], alone.params["decoder"]["bias"], atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [("data.threads=3",), ("train.accumulate=2", "train.ema=0.9")])
def test_the_whole_model(tmp_path, overrides, whole_model):
    """The detector itself, with dropout, noise and denoising queries."""
    run_well(tmp_path / "parts", "train.steps=2", *overrides, module=WHOLE)
    run_well(tmp_path / "parts", "train.steps=4", *overrides, module=WHOLE)
    run_well(tmp_path / "whole", "train.steps=4", *overrides, module=WHOLE)
    config = config_of("train.steps=4", *overrides)
    assert_same_run(tmp_path / "parts", tmp_path / "whole", 4, config)
    assert steps(tmp_path / "parts" / "checkpoints") == [2, 4]


@pytest.mark.slow
def test_the_whole_model_with_two_processes(tmp_path, whole_model):
    """With parameters in two parts, each in both processes: trained, saved, restored, evaluated."""
    for name, last in (("parts", 2), ("parts", 4), ("whole", 4)):
        both(tmp_path / name, f"train.steps={last}", "mesh.data=-1", "mesh.fsdp=2", module=WHOLE)
    assert_same_run(tmp_path / "parts", tmp_path / "whole", 4, config_of("train.steps=4", FOUR))
