"""Batches in parts, and the moving average."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opendet_jax.batch import Batch, Images, Objects
from opendet_jax.checkpoints.restore import restore
from opendet_jax.config import Config, ConfigError
from opendet_jax.config_files import parse_config
from opendet_jax.train.checkpoint import Checkpoints
from opendet_jax.train.optimizer import fresh_state, make_optimizer
from opendet_jax.train.step import accumulated, moving_average

COUNTS = np.array([2, 0, 3, 1, 0, 4])


def batch(counts) -> Batch:
    rng = np.random.default_rng(0)
    size, slots = len(counts), 4
    return Batch(
        Images(rng.integers(0, 256, (size, 2, 2, 3), dtype=np.uint8), np.ones((size, 2, 2), bool)),
        Objects(
            boxes=rng.uniform(size=(size, slots, 4)).astype(np.float32),
            valid=np.arange(slots) < counts[:, None],
            texts=np.zeros((size, slots, 2), np.float32),
            tokens=np.ones((size, slots, 1), np.int32),
        ),
    )


def gradients(params, batch: Batch, key):
    """Of a loss over the number of objects, as most are, which also counts images without any."""

    def loss(params):
        valid = jnp.asarray(batch.objects.valid)
        boxes = jnp.where(valid[..., None], jnp.abs(batch.objects.boxes - params), 0.0).sum()
        background = jnp.square(params).sum() * len(valid)
        return (boxes + background) / jnp.maximum(valid.sum(), 1)

    value, grads = jax.value_and_grad(loss)(params)
    return {"total": value, "noise": jax.random.uniform(key)}, grads


@pytest.mark.parametrize("parts", [2, 3, 6])
@pytest.mark.parametrize("counts", [COUNTS, np.maximum(COUNTS, 1)])
def test_a_sum_over_objects_is_the_same_in_parts(parts, counts):
    params, key = jnp.array([0.1, 0.4, 0.7, 0.2]), jax.random.key(0)
    terms, grads = jax.jit(gradients)(params, batch(counts), key)
    terms_in_parts, grads_in_parts = jax.jit(accumulated(gradients, parts))(params, batch(counts), key)
    np.testing.assert_allclose(terms_in_parts["total"], terms["total"], rtol=1e-6)
    np.testing.assert_allclose(grads_in_parts, grads, rtol=1e-6)
    assert terms_in_parts["noise"] != terms["noise"]


def test_no_object_at_all():
    terms, grads = accumulated(gradients, 2)(jnp.ones(4), batch(np.zeros(4, int)), jax.random.key(0))
    want, wanted = gradients(jnp.ones(4), batch(np.zeros(4, int)), jax.random.key(0))
    np.testing.assert_allclose(terms["total"], want["total"])
    np.testing.assert_allclose(grads, wanted)


def test_parts_must_divide_the_batch():
    with pytest.raises(ConfigError, match=r"train\.accumulate = 3: must be a divisor of data.batch_size = 8"):
        parse_config({"train": {"accumulate": 3}})


def test_average_follows_and_late_steps_weigh_as_its_decay_says():
    old, new = {"x": jnp.array([1.0, 2.0])}, {"x": jnp.array([3.0, 6.0])}
    early = moving_average(old, new, jnp.int32(0), 0.9)
    np.testing.assert_allclose(early["x"], [0.1 * 1 + 0.9 * 3, 0.1 * 2 + 0.9 * 6], rtol=1e-6)
    late = moving_average(old, new, jnp.int32(10_000), 0.9)
    np.testing.assert_allclose(late["x"], [0.9 * 1 + 0.1 * 3, 0.9 * 2 + 0.1 * 6], rtol=1e-6)
    assert moving_average(None, new, jnp.int32(0), 0.0) is None


def test_the_average_is_saved_restored_and_what_a_trained_model_is(tmp_path):
    config = replace(Config(), train=replace(Config().train, ema=0.9))
    params = {"backbone": {"x": jnp.arange(4.0)}, "decoder": {"y": jnp.ones((2, 3))}}
    state = fresh_state(params, make_optimizer(config.optimizer, config.ablation), config)
    state = state.replace(step=jnp.int32(7), average=jax.tree.map(lambda x: x + 0.5, params))
    assert state.evaluated is state.average
    checkpoints = Checkpoints(tmp_path, config)
    checkpoints.save(state, {"next_index": 7})
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path, config)
    restored, _ = checkpoints.restore(jax.tree.map(jnp.zeros_like, state), 7)
    checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    _, found, step = restore(tmp_path)
    assert step == 7
    jax.tree.map(np.testing.assert_array_equal, found, state.average)


def test_without_an_average_the_parameters_are_evaluated():
    state = fresh_state(
        {"decoder": {"y": jnp.ones(3)}}, make_optimizer(Config().optimizer, Config().ablation), Config()
    )
    assert state.average is None
    assert state.evaluated is state.params
