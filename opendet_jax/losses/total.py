"""All losses of a training step and their weighted sum (Eq. 5, 6).

Method: docs/method.md#11-total-loss-and-optimizer.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from opendet_jax.batch import Objects
from opendet_jax.config import Ablation, LossConfig, ModelConfig
from opendet_jax.losses.detection import giou_loss, l1_loss, objectness_focal_loss
from opendet_jax.losses.distillation import distillation_loss
from opendet_jax.losses.joint import joint_loss
from opendet_jax.losses.masked_alignment import masked_alignment_loss, overlapping, own_name, same_name
from opendet_jax.losses.matching import ONE_TO_MANY, ONE_TO_ONE, Matches, Mode, Predictions, Targets, match
from opendet_jax.losses.naming import TextNoise, naming_loss, noisy_texts, text_denoising_loss, text_sigma
from opendet_jax.model.decoder import one_to_many_layers
from opendet_jax.model.distiller import Prompts
from opendet_jax.model.opendet import Training
from opendet_jax.ops.boxes import iou, to_corners
from opendet_jax.ops.chunks import TokenLosses, real_token_losses

LossTerms = dict[str, Float[Array, ""]]
WEIGHTS = {
    "l1": 5.0,
    "giou": 2.0,
    "alignment": 2.0,
    "joint": 1.0,
    "focal": 1.0,
    "distillation": 1.0,
    "naming": 1.0,
    "text_denoising": 1.0,
}


def training_losses(
    training: Training,
    objects: Objects,
    noise: TextNoise,
    token_losses: TokenLosses,
    key: PRNGKeyArray,
    model: ModelConfig,
    ablation: Ablation,
    config: LossConfig,
) -> tuple[Float[Array, ""], LossTerms]:
    """(total, terms). Terms are not weighted; their names are "<term>/<set>", "naming", "text_denoising" and "total".

    Sets: layer_1 … layer_A, encoder, denoising_1 … denoising_A. Normalisers are over the whole (global) batch.

    Args:
      training: what the model computed.
      objects: the named boxes; padded slots influence nothing.
      noise: random numbers of text denoising.
      token_losses: the language model, (prompts [R, E], tokens [R, T], keys [R]) → negative log-likelihoods [R, T];
        its parameters are bound to it as ops/chunks.py has it.
      key: for its dropout: each row gets a key of its own, wherever it is computed.
    """
    targets = clean_targets(objects)
    count = jnp.maximum(targets.valid.sum(), 1).astype(jnp.float32)
    sets = matching_sets(training, targets, model, ablation)
    matches = {mode: match(predictions, targets, mode) for mode, (_, predictions) in sets.items()}
    one_to_one = matches[ONE_TO_ONE]

    terms: LossTerms = {}
    for mode, (names, predictions) in sets.items():
        matched = matches[mode].object
        terms |= _per_set(names, _detection_terms(predictions, matched, targets, mode.copies * count, ablation))
        terms |= _per_set(names, _alignment_terms(predictions, matched, targets, mode, ablation, config))
    names, predictions, matched = denoising_sets(training, targets)
    groups = jnp.maximum(training.denoising.groups, 1)
    terms |= _per_set(names, _detection_terms(predictions, matched, targets, groups * count, ablation))
    if ablation.distiller:
        terms |= _distillation_terms(training, targets, one_to_one, matched)
    terms |= _language_terms(training, targets, one_to_one, noise, token_losses, key, ablation, config)

    total = sum((WEIGHTS[name.split("/")[0]] * term for name, term in terms.items()), jnp.float32(0.0))
    return total, terms | {"total": total}


def _per_set(names: list[str], terms: dict[str, Float[Array, "sets"]]) -> LossTerms:
    return {f"{term}/{name}": values[i] for term, values in terms.items() for i, name in enumerate(names)}


def _detection_terms(
    predictions: Predictions,
    matched_object: Int[Array, "sets B Q"],
    targets: Targets,
    normaliser: Float[Array, ""],
    ablation: Ablation,
) -> dict[str, Float[Array, "sets"]]:
    """Boxes, Joint and focal terms of each set.

    Denoising queries have them too: their score s is that of the aligner at their own object, though they have no
    alignment loss.
    """

    def one_set(p: Predictions, matched_object):
        matched = matched_object >= 0
        index = jnp.maximum(matched_object, 0)[..., None]
        own_boxes = jnp.take_along_axis(targets.boxes, index, axis=1)
        terms = {
            "l1": l1_loss(p.boxes, own_boxes, matched, normaliser),
            "giou": giou_loss(p.boxes, own_boxes, matched, normaliser),
            "focal": objectness_focal_loss(p.objectness, matched, p.valid, normaliser),
        }
        if ablation.joint_loss:
            alignment = jnp.take_along_axis(jax.lax.stop_gradient(p.alignment), index, axis=2)[..., 0]
            overlap = iou(to_corners(jax.lax.stop_gradient(p.boxes)), to_corners(own_boxes))
            terms["joint"] = joint_loss(p.objectness, alignment, overlap, matched, p.valid, normaliser)
        return terms

    return jax.vmap(one_set)(predictions, matched_object)


def _alignment_terms(
    predictions: Predictions,
    matched_object: Int[Array, "sets B Q"],
    targets: Targets,
    mode: Mode,
    ablation: Ablation,
    config: LossConfig,
) -> dict[str, Float[Array, "sets"]]:
    if ablation.masked_alignment:
        mask = same_name(targets.texts, targets.valid, config.name_mask_threshold)
    else:
        mask = own_name(targets.valid)

    def one_set(p: Predictions, matched_object):
        counted = p.valid[:, :, None] & targets.valid[:, None]
        if mode == ONE_TO_ONE:
            counted &= overlapping(jax.lax.stop_gradient(p.boxes), targets.boxes)
        return {"alignment": masked_alignment_loss(p.alignment, matched_object, mask, counted)}

    return jax.vmap(one_set)(predictions, matched_object)


def _prompted(training: Training, one_to_one: Matches) -> tuple[Prompts, Matches]:
    """The prompts that have losses and the matches of their layers: the last layers, as far as they are one-to-one.

    In `one_to_one` the encoder's tokens stand after the layers.
    """
    layers = min(len(training.prompts.language), len(one_to_one.object) - 1)
    prompts = jax.tree.map(lambda x: x[-layers:].astype(jnp.float32), training.prompts)
    return prompts, jax.tree.map(lambda x: x[-1 - layers : -1], one_to_one)


def _distillation_terms(
    training: Training, targets: Targets, one_to_one: Matches, denoising_object: Int[Array, "A B N"]
) -> LossTerms:
    prompts, matches = _prompted(training, one_to_one)
    layers, slots = len(prompts.distilled), denoising_object.shape[-1]
    losses = jax.vmap(distillation_loss, in_axes=(0, None, 0))
    matching = losses(prompts.distilled[:, :, slots:], targets.texts, matches.object)
    denoising = losses(prompts.distilled[:, :, :slots], targets.texts, denoising_object[-layers:])
    last = len(denoising_object)
    numbers = range(last - layers + 1, last + 1)
    return {f"distillation/layer_{n}": loss for n, loss in zip(numbers, matching, strict=True)} | {
        f"distillation/denoising_{n}": loss for n, loss in zip(numbers, denoising, strict=True)
    }


def _language_terms(
    training: Training,
    targets: Targets,
    one_to_one: Matches,
    noise: TextNoise,
    token_losses: TokenLosses,
    key: PRNGKeyArray,
    ablation: Ablation,
    config: LossConfig,
) -> LossTerms:
    """Naming the matched queries and, in the same pass through the language model, text denoising."""
    prompts, matches = _prompted(training, one_to_one)
    layers, batch, _, width = prompts.language.shape
    query = matches.query[:, :, 0]  # layers × B × G: the one copy
    index = training.denoising.valid.shape[1] + jnp.maximum(query, 0)
    rows = jnp.take_along_axis(prompts.language, index[..., None], axis=2)
    rows = rows.swapaxes(0, 1).reshape(batch, -1, width)
    real = (query >= 0).swapaxes(0, 1).reshape(batch, -1)
    tokens = jnp.tile(targets.tokens, (1, layers, 1))
    if not ablation.text_denoising:
        losses = real_token_losses(token_losses, rows, tokens, real, jax.random.split(key, real.shape))
        return {"naming": naming_loss(losses, tokens, real)}

    sigma = text_sigma(targets.texts, targets.valid, config.text_noise_sigma)
    noisy = noisy_texts(targets.texts, noise, sigma, config.text_noise_probability)
    every = jnp.concatenate([real, targets.valid], axis=1)
    losses = real_token_losses(
        token_losses,
        jnp.concatenate([rows, noisy], axis=1),
        jnp.concatenate([tokens, targets.tokens], axis=1),
        every,
        jax.random.split(key, every.shape),
    )
    named = rows.shape[1]
    return {
        "naming": naming_loss(losses[:, :named], tokens, real),
        "text_denoising": text_denoising_loss(losses[:, named:], targets.tokens, targets.valid),
    }


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
