"""Checkpoints: exact round trips, and clear errors for what is missing or does not fit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts

from opendet_jax.checkpoints.restore import restore
from opendet_jax.checkpoints.same_config import CheckpointError, check_same, in_evaluation
from opendet_jax.config import Config, DatasetPaths
from opendet_jax.train import checkpoint as module
from opendet_jax.train.checkpoint import Checkpoints
from opendet_jax.train.optimizer import TrainState, make_optimizer


@pytest.fixture
def state() -> TrainState:
    params = {"backbone": {"x": jnp.arange(4.0) / 3}, "decoder": {"y": jnp.ones((2, 3)) / 7}}
    optimizer = make_optimizer(Config().optimizer, Config().ablation)
    opt_state = optimizer.init(params)
    _, opt_state = optimizer.update(jax.tree.map(jnp.ones_like, params), opt_state, params)
    return TrainState(jnp.asarray(3, jnp.int32), params, opt_state)


def save(workdir, state, config=None) -> None:
    checkpoints = Checkpoints(workdir, config or Config(), kept=lambda steps: steps[-2:])
    checkpoints.save(state, {"next_index": 3})
    checkpoints.close()


def test_round_trip_is_exact(tmp_path, state):
    save(tmp_path, state)
    checkpoints = Checkpoints(tmp_path, Config())
    template = jax.tree.map(jnp.zeros_like, state)
    got, iterator = checkpoints.restore(template, 3)
    checkpoints.close()
    assert jax.tree.structure(got) == jax.tree.structure(state)
    for left, right in zip(jax.tree.leaves(got), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(left, right)
    assert iterator == {"next_index": 3}


def test_orbax_is_asked_for_renaming_by_its_name_and_for_nothing_it_deprecates(tmp_path, monkeypatch):
    asked = []

    class Noted(ocp.CheckpointManager):
        def __init__(self, directory, **keywords):
            asked.append(keywords)
            super().__init__(directory, **keywords)

    monkeypatch.setattr(ocp, "CheckpointManager", Noted)
    Checkpoints(tmp_path, Config()).close()
    assert set(asked[0]) == {"options", "handler_registry"}
    assert asked[0]["options"].atomicity_options.mode == ocp.options.AtomicityMode.ATOMIC_RENAME
    saved = {item for item, arguments in asked[0]["handler_registry"].get_all_entries() if "Save" in arguments.__name__}
    assert saved - {"metrics"} == {
        "params",
        "opt_state",
        "average",
        "iterator",
        "config",
        "run",
    }  # metrics: Orbax's own


def test_restore_for_inference(tmp_path, state):
    config = dataclasses.replace(Config(), name="mine")
    save(tmp_path, state, config)
    got_config, params, step = restore(tmp_path)
    assert (got_config, step) == (config, 3)
    jax.tree.map(np.testing.assert_array_equal, params, state.params)


def test_only_the_newest_are_kept(tmp_path, state):
    for step in (1, 2, 3):
        save(tmp_path, state.replace(step=jnp.asarray(step, jnp.int32)))
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()) == ["2", "3"]


def test_missing_checkpoints_are_named(tmp_path, state):
    with pytest.raises(CheckpointError, match=f"no checkpoint in {tmp_path}"):
        restore(tmp_path)
    save(tmp_path, state)
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 8 in .*; there are 3"):
        restore(tmp_path, 8)


def test_another_config_is_refused_field_by_field(tmp_path, state):
    save(tmp_path, state)
    model = dataclasses.replace(Config().model, width=64)
    other = dataclasses.replace(Config(), model=model, data=dataclasses.replace(Config().data, tokenizer="byt5"))
    checkpoints = Checkpoints(tmp_path, other)
    with pytest.raises(CheckpointError, match=r"model\.width: checkpoint 256, config 64") as error:
        checkpoints.restore(state, 3)
    checkpoints.close()
    assert "data.tokenizer: checkpoint 'google/flan-t5-base', config 'byt5'" in str(error.value)
    assert "ffn_width" not in str(error.value)


def test_a_run_of_before_goes_on_with_what_it_held_out(tmp_path):
    """Versions without the field went by ids alone; where nothing is held out, or by a json, it does not matter."""
    config = Config(data=dataclasses.replace(Config().data, train=DatasetPaths("a.json", "a")))
    saved = config.to_dict()
    del saved["data"]["held_out_by"]
    message = r"data\.held_out_by: checkpoint 'images', config 'photographs'"
    with pytest.raises(CheckpointError, match=message):
        check_same(saved, config, tmp_path)
    check_same(
        saved, dataclasses.replace(config, data=dataclasses.replace(config.data, held_out_by="images")), tmp_path
    )
    for fields in ({"held_out": 0.0}, {"eval": DatasetPaths("b.json", "b")}, {"source": "scenes"}):
        other = dataclasses.replace(config, data=dataclasses.replace(config.data, **fields))
        old = other.to_dict()
        del old["data"]["held_out_by"]
        check_same(old, other, tmp_path)


def test_evaluation_may_choose_what_parameters_do_not_depend_on(tmp_path):
    config = Config()
    model = dataclasses.replace(
        config.model, max_queries=300, query_fill="program", normalise_prompts_at_inference=True
    )
    check_same(config.to_dict(), dataclasses.replace(config, model=model), tmp_path, in_evaluation)
    with pytest.raises(CheckpointError, match=r"model\.max_queries: checkpoint 900, config 300"):
        check_same(config.to_dict(), dataclasses.replace(config, model=model), tmp_path)


@pytest.fixture
def asked(monkeypatch):
    """The specs that TensorStore itself is asked about."""
    specs, to_json = [], module._to_json

    def noted(spec, *arguments, **options):
        specs.append(spec)
        return to_json(spec, *arguments, **options)

    monkeypatch.setattr(ts.KvStore.Spec, "to_json", ts.KvStore.Spec.to_json)  # put back at the end
    monkeypatch.setattr(module, "_to_json", noted)
    monkeypatch.setattr(module, "_answers", {})
    module.ask_once()
    return specs


def test_a_save_asks_about_its_folder_and_not_about_every_array(asked, tmp_path):
    tree = {f"layer_{i}": jnp.full(3, i) for i in range(50)}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "1", tree)
        checkpointer.wait_until_finished()
        assert 1 <= len(asked) <= 5
        restored = checkpointer.restore(tmp_path / "1", tree)
    assert all((restored[name] == tree[name]).all() for name in tree)
    assert len(asked) <= 10


def test_the_answers_are_tensorstore_s(asked):
    for number in range(3 * module.ANSWERS):
        content = {"driver": "file", "path": f"/data/ü'\"\n{number}/"}
        spec = ts.KvStore.Spec(content)
        answer = spec.to_json()
        assert answer == content
        answer["path"] = "changed"
        assert spec.to_json() == content
        assert spec.to_json(include_defaults=True)["file_io_mode"] == "file_io_mode"
    assert len(asked) == 2 * 3 * module.ANSWERS
    assert len(module._answers) <= module.ANSWERS
