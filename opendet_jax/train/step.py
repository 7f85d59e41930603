"""One optimizer step, pure: (state, batch) → (state, loss terms)."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from jaxtyping import Array, Float

from opendet_jax.batch import Batch
from opendet_jax.config import Config
from opendet_jax.losses.naming import draw_text_noise
from opendet_jax.losses.total import training_losses
from opendet_jax.model.denoising import denoising_slots, draw_randoms
from opendet_jax.model.opendet import OpenDet
from opendet_jax.train.state import TrainState

Terms = dict[str, Float[Array, ""]]


def loss_function(model: OpenDet, config: Config) -> Callable[..., tuple[Float[Array, ""], Terms]]:
    """(params, batch, key) → (total, loss terms): forward pass, matching, every loss of section 11."""

    def loss(params, batch: Batch, key) -> tuple[Float[Array, ""], Terms]:
        box_key, text_key, dropout_key, naming_key = jax.random.split(key, 4)
        images, objects = batch.images, batch.objects
        count, slots = objects.valid.shape[0], denoising_slots(config.model, objects.valid.shape[1])
        randoms = draw_randoms(box_key, count, slots, config.model.denoising_labels)
        training: Any = model.apply(
            {"params": params}, images, objects, randoms, deterministic=False, rngs={"dropout": dropout_key}
        )

        def token_losses(prompts, tokens, key) -> Any:
            return model.apply(
                {"params": params}, prompts, tokens, deterministic=False, rngs={"dropout": key}, method="token_losses"
            )

        noise = draw_text_noise(text_key, objects.texts.shape)
        return training_losses(
            training, objects, noise, token_losses, naming_key, config.model, config.ablation, config.loss
        )

    return loss


def make_train_step(
    model: OpenDet, optimizer: optax.GradientTransformation, config: Config
) -> Callable[[TrainState, Batch], tuple[TrainState, Terms]]:
    """The step to jit. Its randomness depends only on (train.seed, step)."""
    gradient = jax.value_and_grad(loss_function(model, config), has_aux=True)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Terms]:
        key = jax.random.fold_in(jax.random.key(config.train.seed), state.step)
        (total, terms), grads = gradient(state.params, batch, key)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        terms = {"total": total, **terms, "gradient_norm": optax.tree.norm(grads)}
        return TrainState(state.step + 1, params, opt_state), terms

    return train_step
