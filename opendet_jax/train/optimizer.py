"""AdamW with one learning rate for each part of the model, parameters that stay frozen, and the state of training.

A frozen parameter gets no update and no weight decay, its Adam moments do not move, and its gradient does not count in
the clipping norm.

Method: docs/method.md#11-total-loss-and-optimizer.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Int

from opendet_jax.config import Ablation, Config, OptimizerConfig
from opendet_jax.model.opendet import OpenDet, init_params
from opendet_jax.parallel.sharding import partition

BETA_1, BETA_2, EPS = 0.9, 0.999, 1e-8  # of AdamW, PyTorch's defaults, which the authors' program has
HEAD = ("name_generator", "t5", "lm_head", "kernel")
EMBEDDING = ("name_generator", "t5", "shared", "embedding")


def group_of(path: tuple[str, ...], config: OptimizerConfig, ablation: Ablation) -> str:
    """The group of a parameter: backbone, detector, generator, head, embedding, or frozen for the whole run.

    Without its LoRA factors the head is all that can adapt to the new prompts, so it then trains from the first step.
    """
    if path[0] == "backbone":
        return "backbone"
    if path[0] != "name_generator":
        return "detector"
    if not ablation.train_llm and "lm_head" not in path:
        return "frozen"
    for name, place, steps in (
        ("head", HEAD, config.freeze_head_steps),
        ("embedding", EMBEDDING, config.freeze_embedding_steps),
    ):
        if path == place and ablation.lora_head and steps != 0:
            return "frozen" if steps < 0 else name
    return "generator"


def param_groups(params: dict[str, Any], config: OptimizerConfig, ablation: Ablation) -> dict[str, Any]:
    """The tree of group names, one a parameter."""
    return unflatten_dict({path: group_of(path, config, ablation) for path in flatten_dict(params)})


def without_frozen_gradients(params: dict[str, Any], config: OptimizerConfig, ablation: Ablation) -> dict[str, Any]:
    """The same numbers; nothing is computed for the gradient of what is frozen for the whole run, which is 0."""
    return jax.tree.map(
        lambda x, group: jax.lax.stop_gradient(x) if group == "frozen" else x,
        params,
        param_groups(params, config, ablation),
    )


class _FreezeState(NamedTuple):
    count: Int[Array, ""]
    inner: Any


def frozen_for(steps: int, inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`inner` from step `steps` on; before that no update, and the inner state as it was."""
    inner = optax.with_extra_args_support(inner)

    def init(params):
        return _FreezeState(jnp.zeros((), jnp.int32), inner.init(params))

    def update(updates, state, params=None, **extra):
        new_updates, new_inner = inner.update(updates, state.inner, params, **extra)
        thawed = state.count >= steps
        new_updates = jax.tree.map(lambda u: jnp.where(thawed, u, jnp.zeros_like(u)), new_updates)
        new_inner = jax.tree.map(lambda new, old: jnp.where(thawed, new, old), new_inner, state.inner)
        return new_updates, _FreezeState(state.count + 1, new_inner)

    return optax.GradientTransformationExtraArgs(init, update)


def _rate(base: float, config: OptimizerConfig, delay: int = 0) -> optax.Schedule:
    """Constant, a tenth after each decay step, optional linear warm-up; `delay`: steps frozen before the first."""
    constant = optax.piecewise_constant_schedule(base, dict.fromkeys(config.decay_steps, 0.1))

    def rate(count):
        step = count + delay
        warm = jnp.minimum(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
        return constant(step) * warm

    return rate


def _scale_by_adam() -> optax.GradientTransformationExtraArgs:
    """optax's Adam, with 1 − β^t to the last digit. Where `taken` is False its state stays as it is.

    optax subtracts in float32: its 1 − 0.999^t is off by 1.3e-5 over the first hundreds of steps, and so is half of it
    every update, in the same direction for all parameters. The state is optax's.
    """
    adam = optax.scale_by_adam(BETA_1, BETA_2, EPS)

    def update(updates, state, params=None, *, taken: Bool[Array, ""] | bool = True, **_):
        new: Any = kept_unless(taken, adam.update(updates, state, params)[1], state)
        first, second = (-jnp.expm1(new.count * math.log(beta)) for beta in (BETA_1, BETA_2))
        scaled = jax.tree.map(lambda mu, nu: mu / first / (jnp.sqrt(nu / second) + EPS), new.mu, new.nu)
        return scaled, new

    return optax.GradientTransformationExtraArgs(adam.init, update)


def kept_unless(taken: Bool[Array, ""] | bool, new: Any, old: Any) -> Any:
    """`new` where the step is taken, else `old`, to the last bit.

    Asked where a number is made this is part of making it; of a state that is ready it is one more pass over memory.
    """
    return jax.tree.map(lambda ours, theirs: jnp.where(taken, ours, theirs), new, old)


def _clip(norm: float) -> optax.GradientTransformation:
    """To a global norm of at most `norm`, by one factor; optax divides, which XLA does in a pass of its own."""

    def update(updates, state, params=None):
        factor = jnp.minimum(1.0, norm / optax.tree.norm(updates))
        return jax.tree.map(lambda gradient: gradient * factor, updates), state

    return optax.GradientTransformation(optax.init_empty_state, update)


def make_optimizer(config: OptimizerConfig, ablation: Ablation) -> optax.GradientTransformationExtraArgs:
    """Clipping over all that is not frozen, then AdamW by group.

    Its `update` takes, by name, `taken`: where that is False the state stays as it is, whatever the gradient holds, and
    the update is not to be added.
    """

    def adamw(base: float, delay: int = 0) -> optax.GradientTransformation:
        return optax.chain(
            _scale_by_adam(),
            optax.add_decayed_weights(config.weight_decay),
            optax.scale_by_learning_rate(_rate(base, config, delay)),
        )

    def freezable(steps: int) -> optax.GradientTransformation:
        return frozen_for(steps, adamw(config.generator_rate, delay=steps)) if steps > 0 else optax.set_to_zero()

    def labels(params):
        return param_groups(params, config, ablation)

    unfrozen = optax.partition(
        {
            "backbone": optax.identity(),
            "detector": optax.identity(),
            "generator": optax.identity(),
            "head": frozen_for(config.freeze_head_steps, optax.identity()),
            "embedding": frozen_for(config.freeze_embedding_steps, optax.identity()),
            "frozen": optax.set_to_zero(),
        },
        labels,
    )
    updates = optax.partition(
        {
            "backbone": adamw(config.backbone_rate),
            "detector": adamw(config.detector_rate),
            "generator": adamw(config.generator_rate),
            "head": freezable(config.freeze_head_steps),
            "embedding": freezable(config.freeze_embedding_steps),
            "frozen": optax.set_to_zero(),
        },
        labels,
    )
    chain = optax.chain(unfrozen, _clip(config.clip_norm), updates)

    def update(updates, state, params=None, *, taken: Bool[Array, ""] | bool = True, **_):
        updates, new = chain.update(updates, state, params, taken=taken)

        # Moments are kept where they are made. What else there is are the counters of Adam, rates and freezing.
        def kept(ours, theirs):
            return kept_unless(taken, ours, theirs) if ours.ndim == 0 else ours

        return updates, jax.tree.map(kept, new, state)

    return optax.GradientTransformationExtraArgs(chain.init, update)


def learning_rates(config: OptimizerConfig, step: int) -> dict[str, float]:
    """Of the parts of the model in the step after `step` ones."""
    bases = {"detector": config.detector_rate, "backbone": config.backbone_rate, "generator": config.generator_rate}
    return {part: float(jnp.asarray(_rate(base, config)(step))) for part, base in bases.items()}


def describe_rates(config: OptimizerConfig) -> str:
    """The learning rates and when they change, in a line."""
    rates = {"detector": config.detector_rate, "backbone": config.backbone_rate, "generator": config.generator_rate}
    line = "learning rates " + ", ".join(f"{name} {rate:g}" for name, rate in rates.items())
    line += f", rising over the first {config.warmup_steps} steps" if config.warmup_steps else ""
    if config.decay_steps:
        line += f", a tenth from step {' and '.join(f'{step:,}' for step in config.decay_steps)} on"
    return line


@struct.dataclass
class TrainState:
    """Arrays; or, in the same places, their shapes or shardings."""

    step: Any  # Int[Array, ""]: steps taken
    params: Any  # dict[str, Any]
    opt_state: optax.OptState
    refused: Any = struct.field(default_factory=lambda: jnp.zeros((), jnp.int32))  # Int[Array, ""]: updates, finite.py
    average: Any = None  # dict[str, Any]: moving average of `params`, where train.ema is not 0

    @property
    def evaluated(self) -> dict[str, Any]:
        """The parameters that are evaluated, and the model that training makes."""
        return self.params if self.average is None else self.average


def fresh_state(params: dict[str, Any], optimizer: optax.GradientTransformation, config: Config) -> TrainState:
    """The state of step 0."""
    average = jax.tree.map(jnp.copy, params) if config.train.ema else None
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), average=average)


def abstract_state(model: OpenDet, optimizer: optax.GradientTransformation, config: Config, mesh: Mesh) -> Any:
    """A TrainState of shapes, types and shardings in place of arrays: what a checkpoint is restored into."""
    params = jax.eval_shape(partial(init_params, model), jax.random.key(0))
    shapes = jax.eval_shape(partial(fresh_state, optimizer=optimizer, config=config), params)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        partition(shapes, mesh),
    )
