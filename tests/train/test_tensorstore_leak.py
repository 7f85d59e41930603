"""Folders of a checkpoint are asked about once, as TensorStore keeps a part of every answer for good."""

import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts

from opendet_jax.train import tensorstore_leak


@pytest.fixture
def asked(monkeypatch):
    """The specs that TensorStore itself is asked about."""
    specs, to_json = [], tensorstore_leak._to_json

    def noted(spec, *arguments, **options):
        specs.append(spec)
        return to_json(spec, *arguments, **options)

    monkeypatch.setattr(ts.KvStore.Spec, "to_json", ts.KvStore.Spec.to_json)  # put back at the end
    monkeypatch.setattr(tensorstore_leak, "_to_json", noted)
    monkeypatch.setattr(tensorstore_leak, "_answers", {})
    tensorstore_leak.ask_once()
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
    for number in range(3 * tensorstore_leak.LIMIT):
        content = {"driver": "file", "path": f"/data/ü'\"\n{number}/"}
        spec = ts.KvStore.Spec(content)
        answer = spec.to_json()
        assert answer == content
        answer["path"] = "changed"
        assert spec.to_json() == content
        assert spec.to_json(include_defaults=True)["file_io_mode"] == "file_io_mode"
    assert len(asked) == 2 * 3 * tensorstore_leak.LIMIT
    assert len(tensorstore_leak._answers) <= tensorstore_leak.LIMIT
