"""A small `Training`, as the model would give it, of random numbers, and a language model of one matrix."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from opendet_jax.batch import Objects
from opendet_jax.config import Ablation, LossConfig, ModelConfig
from opendet_jax.losses.naming import TextNoise
from opendet_jax.losses.total import training_losses
from opendet_jax.model.decoder import Decoded
from opendet_jax.model.denoising import DenoisingQueries
from opendet_jax.model.distiller import Prompts
from opendet_jax.model.encoder import Memory
from opendet_jax.model.neck import Features
from opendet_jax.model.opendet import Training
from opendet_jax.model.query_selection import Queries

A, B, Q, G, N, E, T, V = 4, 3, 10, 4, 20, 6, 3, 9
CONFIG = ModelConfig(one_to_many_layers=2, one_to_one_layers=2, denoising_queries=N)


def boxes(rng, *shape):
    return np.concatenate([rng.uniform(0.3, 0.7, (*shape, 2)), rng.uniform(0.2, 0.5, (*shape, 2))], -1).astype("f4")


def objects(rng, counts=(2, 0, 3)) -> Objects:
    """The first two objects of an image share a name."""
    texts = rng.normal(size=(B, G, E))
    texts[:, 1] = texts[:, 0]
    tokens = rng.integers(2, V, (B, G, T))
    tokens[..., -1] = 1
    return Objects(
        boxes=jnp.asarray(boxes(rng, B, G)),
        valid=jnp.asarray(np.arange(G) < np.array(counts)[:, None]),
        texts=jnp.asarray(texts / np.linalg.norm(texts, axis=-1, keepdims=True), jnp.float32),
        tokens=jnp.asarray(tokens),
    )


def denoising(valid: np.ndarray) -> DenoisingQueries:
    """Slots as in docs/method.md#4-decoder."""
    most = int(valid.sum(1).max())
    groups = max(1, N // (2 * max(most, 1)))
    slot = np.arange(N)
    place = slot % max(2 * most, 1)
    used = np.broadcast_to(slot < 2 * groups * most, (B, N))
    index = place % max(most, 1)
    return DenoisingQueries(
        content=jnp.zeros((B, N, 1)),
        boxes=jnp.full((B, N, 4), 0.5),
        valid=jnp.asarray(used),
        positive=jnp.asarray(used & (place < most) & valid[:, index]),
        object=jnp.broadcast_to(jnp.asarray(index), (B, N)),
        group=jnp.broadcast_to(jnp.asarray(slot // max(2 * most, 1)), (B, N)),
        groups=jnp.asarray(groups),
    )


def training(rng, valid, query_counts=(Q, 7, 8)) -> Training:
    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    # Of the features nothing is read here.
    cell = {"tokens": jnp.zeros((B, 1, 1)), "valid": jnp.ones((B, 1), bool), "valid_ratios": jnp.ones((B, 1, 2))}
    nowhere = cell | {"level_shapes": ((1, 1),)}
    return Training(
        queries=Queries(
            content=jnp.zeros((B, Q, 1)),
            boxes=jnp.asarray(boxes(rng, B, Q)),
            objectness=normal(B, Q),
            valid=jnp.asarray(np.arange(Q) < np.array(query_counts)[:, None]),
            index=jnp.zeros((B, Q), int),
        ),
        denoising=denoising(np.asarray(valid)),
        decoded=Decoded(
            hidden=normal(A, B, N + Q, 2 * E),  # both prompts, as `distil` below has it
            boxes=jnp.asarray(boxes(rng, A, B, N + Q)),
            objectness=normal(A, B, N + Q),
        ),
        alignment=2 * normal(A, B, N + Q, G),
        encoder_alignment=2 * normal(B, Q, G),
        features=Features(**nowhere, positions=jnp.zeros((B, 1, 1))),
        memory=Memory(**nowhere),
    )


def noise(rng) -> TextNoise:
    return TextNoise(
        normal=jnp.asarray(rng.normal(size=(B, G, E)), jnp.float32),
        uniform=jnp.asarray(rng.random((B, G, E)), jnp.float32),
    )


def weights(rng):
    return jnp.asarray(rng.normal(size=(T, E, V)), jnp.float32)


def predictions(training: Training) -> dict[str, jnp.ndarray]:
    """The arrays that have gradients."""
    return {
        "encoder_boxes": training.queries.boxes,
        "encoder_objectness": training.queries.objectness,
        "encoder_alignment": training.encoder_alignment,
        "boxes": training.decoded.boxes,
        "objectness": training.decoded.objectness,
        "alignment": training.alignment,
        "distilled": training.decoded.hidden[..., :E],
        "language": training.decoded.hidden[..., E:],
    }


def with_predictions(training: Training, p: dict[str, jnp.ndarray]) -> Training:
    return training.replace(
        queries=training.queries.replace(boxes=p["encoder_boxes"], objectness=p["encoder_objectness"]),
        encoder_alignment=p["encoder_alignment"],
        decoded=training.decoded.replace(
            hidden=jnp.concatenate([p["distilled"], p["language"]], axis=-1),
            boxes=p["boxes"],
            objectness=p["objectness"],
        ),
        alignment=p["alignment"],
    )


def distil(hidden, boxes) -> Prompts:
    return Prompts(distilled=hidden[..., :E], language=hidden[..., E:])


def _loss(arrays, training, objects, noise, ablation):
    def token_losses(weights, prompts, tokens, keys):
        prompts = jnp.where((tokens != 0).any(axis=1, keepdims=True), prompts, 1.0)
        logits = jnp.einsum("re,tev->rtv", prompts, weights)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=-1)[..., 0]
        return jnp.where(tokens != 0, -chosen, 0.0)

    training, key = with_predictions(training, arrays), jax.random.key(0)
    language_model = Partial(token_losses, arrays["weights"])
    return training_losses(training, objects, noise, distil, language_model, key, CONFIG, ablation, LossConfig())


_terms = jax.jit(_loss, static_argnums=4)
_gradients = jax.jit(jax.grad(_loss, has_aux=True), static_argnums=4)


def terms_only(training, weights, objects, noise, ablation):
    return _terms(predictions(training) | {"weights": weights}, training, objects, noise, ablation)[1]


def terms_and_gradients(training, weights, objects, noise):
    """Loss terms, and the gradients of the total by the predictions and, under "weights", the language model."""
    arrays = predictions(training) | {"weights": weights}
    gradients, terms = _gradients(arrays, training, objects, noise, Ablation())
    return terms, gradients
