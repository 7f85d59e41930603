"""Optimizer steps against torch.optim.AdamW: the same gradients, groups, clipping, decay and schedule."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import torch

from tests.parity import report
from tests.train.test_optimizer import CONFIG, flat, run, tree

STAGE, TOLERANCE = "optimizer step (torch AdamW)", 5e-7


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
        want = tensor.detach().numpy()
        relative = np.abs(ours[name] / want - 1).max()
        absolute = np.abs(ours[name] - want).max()
        report.enter_error(STAGE, "torch.optim.AdamW", absolute, relative, TOLERANCE, is_relative=True)
        np.testing.assert_allclose(ours[name], want, rtol=TOLERANCE, err_msg=name)
    np.testing.assert_array_equal(ours[head], start[head])
