"""Groups, learning rates, clipping and freezing, against torch.optim.AdamW where it can do the same."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from opendet_jax.config import Ablation, OptimizerConfig
from opendet_jax.train.optimizer import group_of, make_optimizer

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


def test_steps_equal_torch_adamw_with_groups_clipping_and_decay():
    config = dataclasses.replace(CONFIG, decay_steps=(2,), clip_norm=0.1)
    rng = np.random.default_rng(1)
    gradients = [jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), tree()) for _ in range(4)]
    ours = flat(run(config, gradients))

    start = flat(tree())
    head = next(name for name in start if "lm_head" in name and "kernel" in name)
    tensors = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in start.items() if name != head}
    rates = {"backbone": 1e-5, "decoder": 1e-4, "name_generator": 2e-4}
    groups = [
        {"params": [p for name, p in tensors.items() if f"'{part}'" in name], "lr": rate}
        for part, rate in rates.items()
    ]
    theirs = torch.optim.AdamW(groups, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.MultiStepLR(theirs, [2], 0.1)
    for gradient in gradients:
        for name, value in flat(gradient).items():
            if name != head:  # frozen: not in the clipping norm
                tensors[name].grad = torch.tensor(value)
        torch.nn.utils.clip_grad_norm_(tensors.values(), 0.1)
        theirs.step()
        schedule.step()
    for name, tensor in tensors.items():
        np.testing.assert_allclose(ours[name], tensor.detach().numpy(), rtol=5e-7, err_msg=name)
    np.testing.assert_array_equal(ours[head], start[head])


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
