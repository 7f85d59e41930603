"""Groups, learning rates, clipping and freezing; tests/parity/test_optimizer.py has steps against PyTorch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from opendet_jax.config import Ablation, OptimizerConfig
from opendet_jax.train.optimizer import group_of, learning_rates, make_optimizer

CONFIG = OptimizerConfig(freeze_head_steps=-1, freeze_embedding_steps=0)


def tree() -> dict:
    rng = np.random.default_rng(0)

    def array(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return {
        "backbone": {"norm1": {"scale": array(5)}},
        "decoder": {"layers_0": {"linear1": {"kernel": array(3, 4)}}},
        "name_generator": {
            "t5": {"lm_head": {"kernel": array(4, 6), "lora_A": array(2, 4)}, "shared": {"embedding": array(6, 4)}}
        },
    }


def flat(params) -> dict[str, np.ndarray]:
    return {jax.tree_util.keystr(k): np.asarray(v) for k, v in jax.tree_util.tree_leaves_with_path(params)}


@pytest.mark.parametrize(
    ("path", "ablation", "group"),
    [
        ("backbone/patch_embed/proj/kernel", Ablation(), "backbone"),
        ("distiller/fusion/kernel", Ablation(), "detector"),
        ("name_generator/t5/decoder/block_0/layer_0/SelfAttention/q/kernel", Ablation(), "generator"),
        ("name_generator/t5/lm_head/kernel", Ablation(), "frozen"),
        ("name_generator/t5/lm_head/lora_A", Ablation(), "generator"),
        ("name_generator/t5/lm_head/kernel", Ablation(lora_head=False), "generator"),
        ("name_generator/t5/decoder/final_layer_norm/weight", Ablation(train_llm=False), "frozen"),
        ("name_generator/t5/lm_head/lora_A", Ablation(train_llm=False), "generator"),
    ],
)
def test_groups(path, ablation, group):
    assert group_of(tuple(path.split("/")), CONFIG, ablation) == group


def run(config: OptimizerConfig, gradients: list[dict], ablation: Ablation | None = None) -> dict:
    params = tree()
    optimizer = make_optimizer(config, ablation or Ablation())
    state = optimizer.init(params)
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_head_thaws_after_its_steps_as_if_training_began_there():
    config = dataclasses.replace(CONFIG, freeze_head_steps=2, clip_norm=1e9)
    gradients = [jax.tree.map(lambda x, i=i: jnp.full_like(x, 1.0 + i), tree()) for i in range(4)]
    kernel = ("name_generator", "t5", "lm_head", "kernel")

    def head(params):
        for name in kernel:
            params = params[name]
        return np.asarray(params)

    np.testing.assert_array_equal(head(run(config, gradients[:2])), head(tree()))
    late = head(run(config, gradients))
    fresh = head(run(dataclasses.replace(config, freeze_head_steps=0), gradients[2:]))
    np.testing.assert_array_equal(late, fresh)
    assert np.abs(late - head(tree())).max() > 1e-4


def test_frozen_gradient_does_not_count_in_the_clipping_norm():
    gradients = jax.tree.map(jnp.ones_like, tree())
    huge = jax.tree.map(jnp.ones_like, tree())
    huge["name_generator"]["t5"]["lm_head"]["kernel"] *= 1e9
    for left, right in zip(
        jax.tree.leaves(run(CONFIG, [gradients])), jax.tree.leaves(run(CONFIG, [huge])), strict=True
    ):
        np.testing.assert_array_equal(left, right)


def test_learning_rates_are_those_of_the_updates():
    config = OptimizerConfig(
        detector_rate=1e-3, backbone_rate=1e-4, warmup_steps=4, decay_steps=(6,), weight_decay=0.0, clip_norm=1e9
    )
    params = {"decoder": {"kernel": jnp.zeros(3)}, "backbone": {"kernel": jnp.zeros(3)}}
    optimizer = make_optimizer(config, Ablation())
    state, gradients = optimizer.init(params), jax.tree.map(jnp.ones_like, params)
    for step in range(8):
        updates, state = optimizer.update(gradients, state, params)
        rates = learning_rates(config, step)
        # Adam's update of a gradient that stays as it is has the size of the rate, as far as 1 − 0.999 has its digits.
        np.testing.assert_allclose(-updates["decoder"]["kernel"], rates["detector"], rtol=3e-5)
        np.testing.assert_allclose(-updates["backbone"]["kernel"], rates["backbone"], rtol=3e-5)
    assert rates == pytest.approx({"detector": 1e-4, "backbone": 1e-5, "generator": config.generator_rate / 10})


def test_the_first_updates_are_whole():
    """Of a gradient that never changes Adam's every update is the rate; optax's own is smaller by up to 1e-5. The state
    is that of optax.adamw, so that checkpoints of either go on."""
    config = dataclasses.replace(CONFIG, freeze_head_steps=0, weight_decay=0.0, clip_norm=1e9)
    optimizer, params = make_optimizer(config, Ablation()), tree()
    state = optimizer.init(params)
    gradient = jax.tree.map(jnp.ones_like, params)
    update = jax.jit(optimizer.update)
    for _ in range(20):
        updates, state = update(gradient, state, params)
        got = np.asarray(updates["decoder"]["layers_0"]["linear1"]["kernel"])
        np.testing.assert_allclose(got, -config.detector_rate, rtol=1e-6)
    inner = state[-1].inner_states["detector"].inner_state
    theirs = optax.adamw(lambda count: 1e-4).init(jnp.zeros(3))
    assert [type(part) for part in inner] == [type(part) for part in theirs]
