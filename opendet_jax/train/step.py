"""One optimizer step, pure: (state, batch) → (state, loss terms). A batch that is too large for the memory goes through
it part after part.

Method: docs/method.md#11-total-loss-and-optimizer.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int

from opendet_jax.batch import Batch
from opendet_jax.compilation import compiler_options
from opendet_jax.config import Config
from opendet_jax.losses.naming import draw_text_noise
from opendet_jax.losses.total import training_losses
from opendet_jax.model.denoising import denoising_slots, draw_randoms
from opendet_jax.model.opendet import OpenDet
from opendet_jax.parallel.mesh import by_example, replicated
from opendet_jax.parallel.sharding import gathered, partition, stored
from opendet_jax.train.finite import count_refused, is_taken
from opendet_jax.train.optimizer import TrainState, kept_unless, without_frozen_gradients

Gradients = Callable[[Any, Batch, Any], tuple[dict[str, Any], Any]]  # (params, batch, key) → (loss terms, gradients)
Terms = dict[str, Float[Array, ""]]


def loss_function(model: OpenDet, config: Config) -> Callable[..., tuple[Float[Array, ""], Terms]]:
    """(params, batch, key) → (total, loss terms): forward pass, matching, every loss."""

    def loss(params, batch: Batch, key) -> tuple[Float[Array, ""], Terms]:
        params = without_frozen_gradients(params, config.optimizer, config.ablation)
        box_key, text_key, dropout_key, naming_key, distiller_key = jax.random.split(key, 5)
        images, objects = batch.images, batch.objects
        count, slots = objects.valid.shape[0], denoising_slots(config.model, objects.valid.shape[1])
        randoms = draw_randoms(box_key, count, slots, config.model.denoising_labels)
        training: Any = model.apply(
            {"params": params}, images, objects, randoms, deterministic=False, rngs={"dropout": dropout_key}
        )

        def distil(hidden, boxes) -> Any:
            seen = (training.features, training.memory)
            rngs = {"dropout": distiller_key}
            return model.apply(
                {"params": params}, hidden, boxes, *seen, deterministic=False, rngs=rngs, method="distil"
            )

        def token_losses(params, prompts, tokens, keys) -> Any:
            return model.apply(
                {"params": params}, prompts, tokens, deterministic=False, keys=keys, method="token_losses"
            )

        language_model = Partial(token_losses, {"name_generator": params["name_generator"]})
        noise = draw_text_noise(text_key, objects.texts.shape)
        return training_losses(
            training, objects, noise, distil, language_model, naming_key, config.model, config.ablation, config.loss
        )

    return loss


def step_gradients(model: OpenDet, config: Config) -> Callable[..., tuple[Terms, Any]]:
    """(params, batch, step) → (loss terms, gradients) of the step that is taken after `step` others.

    Its randomness depends only on (train.seed, step), not on the devices that share the work.
    """
    gradient = jax.value_and_grad(loss_function(model, config), has_aux=True)

    def of_part(params, batch: Batch, key) -> tuple[Terms, Any]:
        (_, terms), grads = gradient(params, batch, key)
        return terms, stored(grads)

    of_batch = accumulated(of_part, config.train.accumulate)

    def gradients(params, batch: Batch, step) -> tuple[Terms, Any]:
        key = jax.random.fold_in(jax.random.key(config.train.seed), step)
        terms, grads = of_batch(gathered(params), batch, key)
        return terms | {"gradient_norm": optax.tree.norm(grads)}, grads

    return gradients


def make_train_step(
    model: OpenDet, optimizer: optax.GradientTransformationExtraArgs, config: Config
) -> Callable[[TrainState, Batch], tuple[TrainState, Terms]]:
    """The step to jit. An update that is not finite is refused (finite.py)."""
    gradients = step_gradients(model, config)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Terms]:
        terms, grads = gradients(state.params, batch, state.step)
        taken = is_taken(state, terms, config.train.non_finite)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params, taken=taken)
        params = kept_unless(taken, optax.apply_updates(state.params, updates), state.params)
        average = moving_average(state.average, params, state.step, config.train.ema)
        average = kept_unless(taken, average, state.average)
        new = replace(state, step=state.step + 1, params=params, opt_state=opt_state, average=average)
        return count_refused(state, new, taken, terms, config.train.non_finite)

    return train_step


def moving_average(average: Any, params: Any, step: Int[Array, ""], decay: float) -> Any:
    """`average` one step on, None where none is kept. Early steps forget faster: little of the start is left."""
    if average is None:
        return None
    decay_now = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda old, new: old + (1.0 - decay_now) * (new - old), average, params)


def jit_step(step: Callable[[TrainState, Batch], tuple[TrainState, Terms]], state: Any, mesh: Mesh) -> Any:
    """The step as one program over the mesh: state and batch lie where they belong before and after it.

    `state`: a TrainState of arrays or of shapes. The state that is given to the program is used up. Call (or lower) it
    under `jax.set_mesh(mesh)`.
    """
    where = partition(state, mesh)
    return jax.jit(
        step,
        in_shardings=(where, by_example(mesh)),
        out_shardings=(where, replicated(mesh)),
        donate_argnums=0,
        compiler_options=compiler_options(mesh.devices.flat[0].platform, trains=True, params=state.params),
    )


def accumulated(gradients: Gradients, parts: int) -> Gradients:
    """`gradients` of a batch cut into `parts` equal ones: the memory of one, and a sum of all.

    A part weighs as much as it has objects (at least one), so that what is a sum over objects divided by their number
    is so over the whole batch. What is divided by something else (matched pairs, images with objects, groups of
    denoising queries) is so within a part. Each part has randomness of its own.
    """
    if parts == 1:
        return gradients

    def of_all(params, batch: Batch, key) -> tuple[dict[str, Any], Any]:
        objects = _by_part(batch.objects.valid, parts).sum((0, 2))
        weights = jnp.maximum(objects, 1) / jnp.maximum(objects.sum(), 1)

        def one(number):
            part = jax.tree.map(
                lambda x: jax.lax.dynamic_index_in_dim(_by_part(x, parts), number, axis=1, keepdims=False), batch
            )
            found = gradients(params, part, jax.random.fold_in(key, number))
            return jax.tree.map(lambda x: weights[number] * x, found)

        def add(number, sums):
            return jax.tree.map(jnp.add, sums, one(number))

        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, 0))
        return jax.lax.fori_loop(0, parts, add, nothing)

    return of_all


def _by_part(x: Any, parts: int) -> jax.Array:
    """[B, …] → [B / parts, parts, …]. Every parts-th image goes to the same part: where B is split over devices, each
    keeps its own images."""
    return jnp.asarray(x).reshape(-1, parts, *x.shape[1:])
