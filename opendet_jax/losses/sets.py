"""The sets of queries that have losses: decoder layers, the encoder's tokens, denoising queries; and their targets."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from opendet_jax.batch import Objects
from opendet_jax.config import Ablation, ModelConfig
from opendet_jax.losses.matching import ONE_TO_MANY, ONE_TO_ONE, Mode, Predictions, Targets
from opendet_jax.model.decoder import one_to_many_layers
from opendet_jax.model.opendet import Training


def clean_targets(objects: Objects) -> Targets:
    """Padded slots get harmless numbers, so that not even a NaN of theirs reaches a sum or a gradient."""
    valid = jnp.asarray(objects.valid)
    return Targets(
        boxes=jnp.where(valid[..., None], objects.boxes, 0.5),
        valid=valid,
        texts=jnp.where(valid[..., None], objects.texts, 0.0),
        tokens=jnp.where(valid[..., None], objects.tokens, 0),
    )


def _predictions(boxes, objectness, alignment, valid, targets: Targets) -> Predictions:
    """In float32, and harmless where they are not valid, as padded targets are."""
    real = valid[..., None]
    return Predictions(
        boxes=jnp.where(real, boxes.astype(jnp.float32), 0.5),
        objectness=jnp.where(valid, objectness.astype(jnp.float32), 0.0),
        alignment=jnp.where(real & targets.valid[:, None], alignment.astype(jnp.float32), 0.0),
        valid=valid,
    )


def matching_sets(
    training: Training, targets: Targets, model: ModelConfig, ablation: Ablation
) -> dict[Mode, tuple[list[str], Predictions]]:
    """The sets of each mode with a leading axis: layers 1–4, and layers 5–6 with the encoder's tokens after them."""
    queries, decoded = training.queries, training.decoded
    first = training.denoising.valid.shape[1]  # denoising queries stand before the matching ones
    layers = _predictions(
        decoded.boxes[:, :, first:],
        decoded.objectness[:, :, first:],
        training.alignment[:, :, first:],
        jnp.broadcast_to(queries.valid, (len(decoded.boxes), *queries.valid.shape)),
        targets,
    )
    encoder = _predictions(
        queries.boxes[None],
        queries.objectness[None],
        training.encoder_alignment[None],
        queries.valid[None],
        targets,
    )
    names = [f"layer_{layer + 1}" for layer in range(len(decoded.boxes))]
    split = one_to_many_layers(model, ablation)
    one_to_one = jax.tree.map(lambda x, e: jnp.concatenate([x[split:], e]), layers, encoder)
    sets = {ONE_TO_ONE: ([*names[split:], "encoder"], one_to_one)}
    if split:
        sets[ONE_TO_MANY] = (names[:split], jax.tree.map(lambda x: x[:split], layers))
    return sets


def denoising_sets(training: Training, targets: Targets) -> tuple[list[str], Predictions, Int[Array, "A B N"]]:
    """The denoising queries of all layers and their objects, which need no matching."""
    denoising, decoded = training.denoising, training.decoded
    layers, slots = len(decoded.boxes), denoising.valid.shape[1]
    predictions = _predictions(
        decoded.boxes[:, :, :slots],
        decoded.objectness[:, :, :slots],
        training.alignment[:, :, :slots],
        jnp.broadcast_to(denoising.valid, (layers, *denoising.valid.shape)),
        targets,
    )
    matched = jnp.where(denoising.positive, denoising.object, -1)
    names = [f"denoising_{layer + 1}" for layer in range(layers)]
    return names, predictions, jnp.broadcast_to(matched, (layers, *matched.shape))
