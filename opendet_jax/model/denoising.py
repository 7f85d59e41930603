"""Contrastive denoising queries: ground-truth boxes, disturbed, for the decoder to restore.

The N slots hold `groups` groups; a group is M positives (boxes a little off) and then M negatives (boxes further off),
one of each for every object, where M is the largest number of objects in the batch.

Method: docs/method.md#denoising-queries.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from opendet_jax.batch import Objects
from opendet_jax.config import ModelConfig
from opendet_jax.ops.boxes import logit

FLIP_PROBABILITY = 0.25  # of a random label in the place of the true one


@struct.dataclass
class DenoisingRandoms:
    u_flip: Float[Array, "B N"]  # U(0, 1): the label is replaced where it is below 0.25
    new_label: Int[Array, "B N"]
    sign: Float[Array, "B N 4"]  # ±1, the direction in which each corner coordinate moves
    u_box: Float[Array, "B N 4"]  # U(0, 1), how far


@struct.dataclass
class DenoisingQueries:
    content: Float[Array, "B N D"]
    boxes: Float[Array, "B N 4"]  # (cx, cy, w, h) in [0, 1]: the first reference boxes
    valid: Bool[Array, "B N"]  # the slot is used: it has an object, or its image has fewer objects than M
    positive: Bool[Array, "B N"]  # a positive with an object
    object: Int[Array, "B N"]  # the object the slot belongs to (0 where it has none)
    group: Int[Array, "B N"]
    groups: Int[Array, ""]


def denoising_slots(config: ModelConfig, max_objects: int) -> int:
    """N: room for config.denoising_queries, and for one group of the most crowded image (G objects); 0 without them."""
    return max(config.denoising_queries, 2 * max_objects) if config.denoising_queries else 0


def draw_randoms(key: Array, batch: int, slots: int, labels: int) -> DenoisingRandoms:
    """Random numbers for B × N slots. The last of the `labels` embedding rows is never drawn (DINO's "no label")."""
    flip, label, sign, box = jax.random.split(key, 4)
    return DenoisingRandoms(
        u_flip=jax.random.uniform(flip, (batch, slots)),
        new_label=jax.random.randint(label, (batch, slots), 0, labels - 1),
        sign=jax.random.rademacher(sign, (batch, slots, 4), dtype=jnp.float32),
        u_box=jax.random.uniform(box, (batch, slots, 4)),
    )


def disturb(
    boxes: Float[Array, "B N 4"],
    negative: Bool[Array, "B N"],
    sign: Float[Array, "B N 4"],
    u: Float[Array, "B N 4"],
) -> Float[Array, "B N 4"]:
    """Moves the corners by ±r·(w/2 or h/2), r = u for positives and u + 1 for negatives, clamped to the image.

    Crossed corners give negative sizes, which the clamped logit turns into the smallest box.
    """
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    moved = sign * (u + negative[..., None])
    # The corners as seen from the centre: the size of a small box would lose digits in the difference of two places.
    low = jnp.clip(half * (moved[..., :2] - 1.0), -centre, 1.0 - centre)
    high = jnp.clip(half * (moved[..., 2:] + 1.0), -centre, 1.0 - centre)
    return nn.sigmoid(logit(jnp.concatenate([centre + (low + high) / 2, high - low], axis=-1)))


class Denoising(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(self, objects: Objects, randoms: DenoisingRandoms) -> DenoisingQueries:
        """B × N denoising queries. Slots without an object have content 0 and the box (½, ½, ½, ½).

        Without slots (N = 0) there is no label embedding.
        """
        config = self.config
        real = jnp.asarray(objects.valid)
        batch, slots = randoms.u_flip.shape
        most = real.sum(axis=1).max()  # M, traced: of the whole batch, on all devices
        groups = jnp.maximum(1, config.denoising_queries // (2 * jnp.maximum(most, 1)))
        slot = jnp.arange(slots)
        group, place = jnp.divmod(slot, jnp.maximum(2 * most, 1))
        negative = place >= most
        used = slot < 2 * groups * most
        number = jnp.where(used, place % jnp.maximum(most, 1), 0)

        # the image's real objects, wherever they stand among the G
        order = jnp.argsort(~real, axis=1, stable=True)
        index = order[:, number]  # a padded object where the image has fewer than M
        occupied = used & jnp.take_along_axis(real, index, axis=1)

        dtype = jnp.dtype(config.dtype)
        content = jnp.zeros((batch, slots, config.width), dtype)
        if slots:
            label = jnp.where(randoms.u_flip < FLIP_PROBABILITY, randoms.new_label, 0)
            embedding = nn.Embed(
                config.denoising_labels,
                config.width,
                embedding_init=nn.initializers.normal(1.0),
                dtype=dtype,
                name="label_embedding",
            )
            content = jnp.where(occupied[..., None], embedding(label), 0)
        boxes = jnp.take_along_axis(jnp.asarray(objects.boxes), index[..., None], axis=1)
        boxes = jnp.where(occupied[..., None], boxes, 0.5)
        disturbed = disturb(boxes, jnp.broadcast_to(negative, occupied.shape), randoms.sign, randoms.u_box)
        return DenoisingQueries(
            content=content,
            boxes=jnp.where(occupied[..., None], disturbed, 0.5),
            valid=jnp.broadcast_to(used, (batch, slots)),
            positive=occupied & ~negative,
            object=jnp.where(occupied, index, 0),
            group=jnp.broadcast_to(group, (batch, slots)),
            groups=groups,
        )


def attention_mask(denoising: DenoisingQueries, query_valid: Bool[Array, "B Q"]) -> Bool[Array, "B K K"]:
    """Who sees whom in self-attention, K = N + Q, True = row may look at column.

    A denoising group sees only itself, a query only queries, and nobody an empty slot.
    """
    group = jnp.concatenate([denoising.group, jnp.full(query_valid.shape, -1)], axis=1)
    valid = jnp.concatenate([denoising.valid, query_valid], axis=1)
    return (group[:, :, None] == group[:, None, :]) & valid[:, None, :]
