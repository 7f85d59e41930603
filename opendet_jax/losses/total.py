"""All losses of a training step and their weighted sum (Eq. 5, 6).

Method: docs/method.md#11-total-loss-and-optimizer.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from opendet_jax.batch import Objects
from opendet_jax.config import Ablation, LossConfig, ModelConfig
from opendet_jax.losses.detection import giou_loss, l1_loss, objectness_focal_loss
from opendet_jax.losses.distillation import distillation_loss
from opendet_jax.losses.joint import joint_loss
from opendet_jax.losses.masked_alignment import masked_alignment_loss, overlapping, own_name, same_name
from opendet_jax.losses.matching import ONE_TO_MANY, ONE_TO_ONE, Matches, Mode, Predictions, Targets, match
from opendet_jax.losses.naming import (
    PADDING,
    TextNoise,
    naming_loss,
    noisy_texts,
    text_denoising_loss,
    text_sigma,
)
from opendet_jax.model.decoder import one_to_many_layers
from opendet_jax.model.distiller import Prompts
from opendet_jax.model.opendet import Training
from opendet_jax.ops.boxes import iou, to_corners
from opendet_jax.ops.devices import on_each_device

LossTerms = dict[str, Float[Array, ""]]
Distil = Callable[[Float[Array, "B P D"], Float[Array, "B P 4"]], Prompts]
# All arrays that it uses are bound to it, so that they can have gradients and be handed to each device.
TokenLosses = Partial
PROMPTED_LAYERS = 2  # the last, as far as they are one-to-one, have prompts
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
    distil: Distil,
    token_losses: TokenLosses,
    key: PRNGKeyArray,
    model: ModelConfig,
    ablation: Ablation,
    config: LossConfig,
) -> tuple[Float[Array, ""], LossTerms]:
    """(total, terms). Terms are not weighted; their names are "<term>/<set>", "naming", "text_denoising" and "total".

    Sets: layer_1 … layer_A, encoder, denoising_1 … denoising_A (unless N = 0). Normalisers are over the
    whole (global) batch.

    Args:
      training: what the model computed.
      objects: the named boxes; padded slots influence nothing.
      noise: random numbers of text denoising.
      distil: the distiller, (h_l [B, P, D], boxes [B, P, 4]) → prompts [B, P, E].
      token_losses: the language model, (prompts [R, E], tokens [R, T], keys [R]) → negative log-likelihoods [R, T];
        a row of tokens 0 is none.
      key: for its dropout: each row gets a key of its own, wherever it is computed.
    """
    targets = clean_targets(objects)
    count = jnp.maximum(targets.valid.sum(), 1).astype(jnp.float32)
    sets = matching_sets(training, targets, model, ablation)
    matches = {mode: match(predictions, targets, mode) for mode, (_, predictions) in sets.items()}

    terms: LossTerms = {}
    for mode, (names, predictions) in sets.items():
        matched = matches[mode].object
        terms |= _per_set(names, _detection_terms(predictions, matched, targets, mode.copies * count, ablation))
        terms |= _per_set(names, _alignment_terms(predictions, matched, targets, mode, ablation, config))
    if training.denoising.valid.shape[1]:
        names, predictions, matched = denoising_sets(training, targets)
        groups = jnp.maximum(training.denoising.groups, 1)
        terms |= _per_set(names, _detection_terms(predictions, matched, targets, groups * count, ablation))

    layers = min(PROMPTED_LAYERS, len(matches[ONE_TO_ONE].object) - 1)
    prompted = prompted_queries(training, matches[ONE_TO_ONE], layers)
    prompts = _prompts(training, prompted, distil)
    if ablation.distiller:
        terms |= _distillation_terms(prompts, prompted, targets, len(training.decoded.boxes))
    terms |= _language_terms(prompts, prompted, targets, noise, token_losses, key, ablation, config)

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


@struct.dataclass
class Prompted:
    """The queries that teach by their prompts, of the last layers: denoising positives, then one place an object.

    P = N/2 + G places in each of the r layers: at most half the denoising slots are positives. Other queries have no
    prompt in training.
    """

    query: Int[Array, "r B P"]  # of the K
    object: Int[Array, "r B P"]  # its object; −1: nobody stands here


def prompted_queries(training: Training, one_to_one: Matches, layers: int) -> Prompted:
    """Those of the last `layers`, given the matches of the one-to-one layers and, after them, the encoder's tokens."""
    denoising = training.denoising
    slots = denoising.valid.shape[1]
    positives = jnp.argsort(~denoising.positive, axis=1, stable=True)[:, : slots // 2]
    is_positive = jnp.take_along_axis(denoising.positive, positives, axis=1)
    own = jnp.where(is_positive, jnp.take_along_axis(denoising.object, positives, axis=1), -1)
    matched = one_to_one.query[-1 - layers : -1, :, 0]  # layers × B × G: the one copy
    objects = jnp.where(matched >= 0, jnp.arange(matched.shape[-1]), -1)

    def of_layers(x):
        return jnp.broadcast_to(x, (layers, *x.shape))

    return Prompted(
        query=jnp.concatenate([of_layers(positives), slots + jnp.maximum(matched, 0)], axis=-1),
        object=jnp.concatenate([of_layers(own), objects], axis=-1),
    )


def _prompts(training: Training, prompted: Prompted, distil: Distil) -> Prompts:
    """Their VL-prompts, [r, B, P, E]. Queries do not meet in the distiller, so those of all layers go in one row."""
    layers = len(prompted.query)

    def one_row(x: Float[Array, "A B K n"]) -> Float[Array, "B rP n"]:
        chosen = jnp.take_along_axis(x[-layers:], prompted.query[..., None], axis=2)
        return jnp.concatenate(list(chosen), axis=1)

    prompts = distil(one_row(training.decoded.hidden), one_row(training.decoded.boxes))
    return jax.tree.map(lambda p: jnp.stack(jnp.split(p.astype(jnp.float32), layers, axis=1)), prompts)


def _distillation_terms(
    prompts: Prompts, prompted: Prompted, targets: Targets, decoder_layers: int
) -> dict[str, Float[Array, ""]]:
    layers, objects = len(prompted.object), targets.valid.shape[1]
    losses = jax.vmap(distillation_loss, in_axes=(0, None, 0))
    matching = losses(prompts.distilled[:, :, -objects:], targets.texts, prompted.object[:, :, -objects:])
    numbers = range(decoder_layers - layers + 1, decoder_layers + 1)
    terms = {f"distillation/layer_{n}": loss for n, loss in zip(numbers, matching, strict=True)}
    if prompted.object.shape[2] > objects:
        denoising = losses(prompts.distilled[:, :, :-objects], targets.texts, prompted.object[:, :, :-objects])
        terms |= {f"distillation/denoising_{n}": loss for n, loss in zip(numbers, denoising, strict=True)}
    return terms


def _language_terms(
    prompts: Prompts,
    prompted: Prompted,
    targets: Targets,
    noise: TextNoise,
    token_losses: TokenLosses,
    key: PRNGKeyArray,
    ablation: Ablation,
    config: LossConfig,
) -> LossTerms:
    """Naming the matched queries and, in the same pass through the language model, text denoising."""
    batch, objects, width = targets.texts.shape
    rows = prompts.language[:, :, -objects:].swapaxes(0, 1).reshape(batch, -1, width)
    real = (prompted.object[:, :, -objects:] >= 0).swapaxes(0, 1).reshape(batch, -1)
    tokens = jnp.tile(targets.tokens, (1, len(prompted.object), 1))
    if not ablation.text_denoising:
        losses = _token_losses(token_losses, rows, tokens, real, key)
        return {"naming": naming_loss(losses, tokens, real)}

    sigma = text_sigma(targets.texts, targets.valid, config.text_noise_sigma)
    noisy = noisy_texts(targets.texts, noise, sigma, config.text_noise_probability)
    losses = _token_losses(
        token_losses,
        jnp.concatenate([rows, noisy], axis=1),
        jnp.concatenate([tokens, targets.tokens], axis=1),
        jnp.concatenate([real, targets.valid], axis=1),
        key,
    )
    named = rows.shape[1]
    return {
        "naming": naming_loss(losses[:, :named], tokens, real),
        "text_denoising": text_denoising_loss(losses[:, named:], targets.tokens, targets.valid),
    }


def _token_losses(
    token_losses: TokenLosses,
    prompts: Float[Array, "B R E"],
    tokens: Int[Array, "B R T"],
    real: Bool[Array, "B R"],
    key: PRNGKeyArray,
) -> Float[Array, "B R T"]:
    """Token losses of the real rows, 0 elsewhere. Where B is split over devices, each does this with its own rows."""

    def own(token_losses, prompts, tokens, words):
        keys = jax.random.wrap_key_data(words)
        flat = token_losses(prompts.reshape(-1, prompts.shape[-1]), tokens.reshape(-1, tokens.shape[-1]), keys.ravel())
        return flat.reshape(tokens.shape)

    words = jax.random.key_data(jax.random.split(key, real.shape))
    tokens = jnp.where(real[..., None], tokens, PADDING)
    return on_each_device(own, prompts, tokens, words, shared=[token_losses], xla_splits_rest=True)


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
