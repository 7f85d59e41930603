"""A run and converted weights of an earlier version (commit 6239991): read, gone on with, evaluated as it did.

`written_before.tar.xz` holds the workdir of a small run after 4 of its 6 steps, a folder of converted Swin weights, and
in `expected.json` what the version that wrote them made of both: the norms of the parameters after step 6, the last
loss terms, the evaluation with every box, name and score. The run has no dropout: what is dropped has been drawn
otherwise since.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax.traverse_util import flatten_dict
from orbax.checkpoint import v1

import opendet_jax
from opendet_jax.checkpoints.folder import load
from opendet_jax.checkpoints.restore import restore
from opendet_jax.checkpoints.same_config import as_written
from opendet_jax.config_files import parse_config
from opendet_jax.train.training_loop import train

ROUNDING = 1e-4  # programs round otherwise now, and Adam enlarges it where gradients are near zero
# What shifts a whole channel ahead of a GroupNorm of one channel a group has no gradient but rounding's, of which Adam
# makes steps, in other directions with another compiler: that they are small is all that can be said of them.
NO_GRADIENT = [f"{name}/bias" for i in (1, 2) for name in (f"backbone/norm{i}", f"neck/projections_{i - 1}")]
NOISE = 1e-3  # what is learnt has norms from 4e-3 on


@pytest.fixture(scope="module")
def before(run_written_before, tmp_path_factory) -> Path:
    """What the archive holds, to be gone on with."""
    return Path(shutil.copytree(run_written_before.parent, tmp_path_factory.mktemp("before") / "copy"))


@pytest.fixture(scope="module")
def expected(before) -> dict:
    return json.loads((before / "expected.json").read_text())


@pytest.fixture(scope="module")
def continued(before) -> Path:
    """The run, taken to its end."""
    config = parse_config(json.loads((before / "run" / "config.json").read_text()))
    assert config.train.steps == 4
    train(replace(config, train=replace(config.train, steps=6)), before / "run")
    return before / "run"


def norms(tree) -> dict[str, float]:
    leaves = flatten_dict(jax.device_get(tree), sep="/")
    return {name: float(np.sqrt(np.square(leaf.astype(np.float64)).sum())) for name, leaf in leaves.items()}


def test_the_run_goes_on_as_it_would_have(continued, expected):
    config, params, step = restore(continued)
    assert (step, config.train.steps) == (6, 6)
    found = norms(params)
    assert found.keys() == expected["norms"].keys()
    wanted = {name: expected["norms"][name] for name in found}
    for name in NO_GRADIENT:
        assert max(found.pop(name), wanted.pop(name)) < NOISE
    np.testing.assert_allclose(list(found.values()), list(wanted.values()), rtol=ROUNDING)
    rows = [json.loads(line) for line in (continued / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for row, then in zip(rows[4:], expected["metrics"], strict=True):
        since = {name for name in row if name.startswith("learning_rate/")}  # not in the log of those days
        then.pop("update_norm")  # and this only in that
        assert {name: row[name] for name in row.keys() - since} == pytest.approx(then, rel=ROUNDING, abs=1e-7)


def test_it_evaluates_to_the_same_digits(continued, expected):
    folder = continued / "eval" / "scenes"
    evaluation, then = json.loads((folder / "metrics.json").read_text()), expected["evaluation"]
    assert {key: evaluation[key] for key in then} == then
    predictions = json.loads((folder / "predictions.json").read_text())
    assert len(predictions) == len(expected["predictions"]) > 0
    for found, wanted in zip(predictions, expected["predictions"], strict=True):
        assert (found["image_id"], found["category_id"], found["names"]) == (
            wanted["image_id"],
            wanted["category_id"],
            wanted["names"],
        )
        assert found["score"] == pytest.approx(wanted["score"], rel=ROUNDING)
        assert found["bbox"] == pytest.approx(wanted["bbox"], abs=0.01)  # pixels


def test_the_model_detects(before, expected):
    detector = opendet_jax.load(before / "run", checkpoint=4)
    assert len(detector.detect(np.zeros((32, 32, 3), np.uint8), min_score=0.0)) > 0


def test_converted_weights_are_read(before, expected):
    converted = load(before / "converted", "swin")
    assert converted.kind == "swin"
    assert converted.config["embed_dim"] == 4
    assert norms(converted.params) == pytest.approx(expected["backbone"])


def test_the_next_interface_of_orbax_reads_them(before):
    config, params, _ = restore(before / "run", 4)
    wanted = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), params)
    read = v1.load_checkpointables(before / "run" / "checkpoints" / "4", {"params": wanted, "config": None})
    assert parse_config(as_written(read["config"])) == config
    jax.tree.map(np.testing.assert_array_equal, read["params"], params)


def test_reading_a_model_looks_at_its_parameters_alone(run_written_before, monkeypatch):
    """Not at the optimizer's arrays, which are twice as many, and took most of the time."""
    looked = []
    metadata = ocp.StandardCheckpointHandler.metadata

    def note(handler, directory):
        looked.append(Path(directory).name)
        return metadata(handler, directory)

    monkeypatch.setattr(ocp.StandardCheckpointHandler, "metadata", note)
    _, params, step = restore(run_written_before)
    assert step == 4
    assert looked == ["params"]
    assert jax.tree.structure(params) == jax.tree.structure(load(run_written_before, "opendet").params)
