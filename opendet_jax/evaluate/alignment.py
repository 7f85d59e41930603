"""The paper's analysis (sections 4.3 and C.1): of the query that is matched with each object, how well it agrees with
the object's text (query–text alignment), and how similar its generated name is to the object's (name similarity).

Queries are matched as in training, one-to-one at the last layer, so that every object counts once.

Method: docs/method.md#8-matching, docs/method.md#13-evaluation.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int
from numpy import ndarray

from opendet_jax.batch import Images, Objects
from opendet_jax.compilation import CompilingFirst, compiler_options
from opendet_jax.config import Config
from opendet_jax.data.formats.records import Dataset, Record
from opendet_jax.data.pipeline import evaluation_batches
from opendet_jax.evaluate.name_similarity import NameTexts
from opendet_jax.inference import Inference
from opendet_jax.losses.matching import ONE_TO_ONE, Predictions, Targets, match
from opendet_jax.ops.boxes import to_centres


@dataclass(frozen=True)
class Alignment:
    """The n matched queries of a data set, in the order in which its images are evaluated."""

    embeddings: str  # what turns names into vectors
    objects: int  # of the data set; without a query are those beyond the number of queries of their image
    cosine: Float32[ndarray, " n"]  # query–text alignment: the first term of Eq. 2
    score: Float32[ndarray, " n"]  # σ(S), what training makes large
    similarity: Float32[ndarray, " n"]  # of names; NaN where the generated one has no embedding

    def summary(self) -> dict[str, Any]:
        """Mean and standard deviation (of the population) of each, and over how many; None over none."""
        return {
            "embeddings": self.embeddings,
            "objects": self.objects,
            "query_text_cosine": _mean_and_std(self.cosine),
            "query_text_score": _mean_and_std(self.score),
            "name_similarity": _mean_and_std(self.similarity[~np.isnan(self.similarity)]),
        }

    def __str__(self) -> str:
        summary = self.summary()
        parts = [
            f"{title} {_shown(summary[key])}"
            for title, key in (
                ("query–text alignment", "query_text_cosine"),
                ("its score σ(S)", "query_text_score"),
                ("name similarity", "name_similarity"),
            )
        ]
        return f"  {'matched queries':<24} " + "  ".join(parts) + f"  (embeddings: {self.embeddings})"


def _mean_and_std(values: Float32[ndarray, " n"]) -> dict[str, float | int | None]:
    exact = values.astype(np.float64)
    mean, std = (float(exact.mean()), float(exact.std())) if len(exact) else (None, None)
    return {"mean": mean, "std": std, "count": len(exact)}


def _shown(numbers: dict[str, Any]) -> str:
    return f"{numbers['mean']:.3f} ± {numbers['std']:.3f} of {numbers['count']}" if numbers["count"] else "–"


class _Matched(NamedTuple):
    """Of each object its query, −1 if it has none, and what is known of the two."""

    query: Int[Array | ndarray, "B G"]
    cosine: Float[Array | ndarray, "B G"]
    score: Float[Array | ndarray, "B G"]
    prompts: Float[Array | ndarray, "B G E"]


def analyse(inference: Inference, dataset: Dataset, config: Config, texts: NameTexts) -> Alignment:
    """A pass of its own over the data set. Raises ImageError: an image cannot be read."""
    records = {record.image_id: record for record in dataset.records}
    slots = max(1, *(len(record.boxes) for record in dataset.records))  # one size, hence one compilation a bucket
    options = compiler_options(jax.default_backend())
    find = jax.jit(inference.on_each_device(partial(_find, inference.model)), compiler_options=options)
    found: list[Float32[ndarray, "n 3"]] = [np.zeros((0, 3), np.float32)]
    with CompilingFirst(total=len(dataset), desc=f"analyse {config.data.name}", unit="image") as progress:
        for batch in evaluation_batches(dataset, config.data, config.eval.batch_size):
            shown = [records[image_id] for image_id in batch.image_ids[: batch.real].tolist()]
            objects = _objects(shown, len(batch.image_ids), slots, texts)
            everything = jax.device_get(find(inference.params, inference.place((batch.images, objects))))
            matched = _Matched(*(x[: len(shown)] for x in everything))
            found.append(_measure(inference, matched, shown, texts))
            progress.update(len(shown))
    objects = sum(len(record.boxes) for record in dataset.records)
    return Alignment(texts.title, objects, *np.concatenate(found).T)


def _objects(records: list[Record], size: int, slots: int, texts: NameTexts) -> Objects:
    """The objects of the images; what fills the batch up has none."""
    corners, valid = np.zeros((size, slots, 4), np.float32), np.zeros((size, slots), bool)
    rows = np.zeros((size, slots, texts.width), np.float32)
    for place, record in enumerate(records):
        count = len(record.boxes)
        corners[place, :count] = record.boxes / np.array([record.width, record.height] * 2, np.float32)
        valid[place, :count] = True
        rows[place, :count] = texts.true([names[0] for names in record.names])
    boxes = np.asarray(to_centres(jnp.asarray(corners)))
    return Objects(boxes, valid, rows, np.zeros((size, slots, 1), np.int32))


def _find(model: nn.Module, params: Any, batch: tuple[Images, Objects]) -> _Matched:
    images, objects = batch
    outputs: Any = model.apply({"params": params}, images, objects.texts, method="detect_and_align")
    detected, agreement = outputs
    boxes, objectness = (x[-1:].astype(jnp.float32) for x in (detected.decoded.boxes, detected.decoded.objectness))
    predictions = Predictions(boxes, objectness, agreement.logits[None], detected.queries.valid[None])
    targets = Targets(*map(jnp.asarray, (objects.boxes, objects.valid, objects.texts, objects.tokens)))
    query = match(predictions, targets, ONE_TO_ONE).query[0, :, 0]
    place = jnp.maximum(query, 0)[..., None]

    def of_match(x: Float[Array, "B Q G"]) -> Float[Array, "B G"]:
        return jnp.take_along_axis(x.swapaxes(1, 2), place, axis=2)[..., 0]

    prompts = jnp.take_along_axis(detected.prompts, place, axis=1)
    return _Matched(query, of_match(agreement.cosine), nn.sigmoid(of_match(agreement.logits)), prompts)


def _measure(
    inference: Inference, matched: _Matched, records: list[Record], texts: NameTexts
) -> Float32[ndarray, "n 3"]:
    """Cosine, score and name similarity of the matched queries of a batch."""
    has_query = matched.query >= 0
    true = [
        names[0]
        for record, of_image in zip(records, has_query, strict=True)
        for names, has in zip(record.names, of_image[: len(record.names)], strict=True)
        if has
    ]
    names, _ = inference.name(np.asarray(matched.prompts[has_query]))
    similarity = (texts.true(true) * texts.generated(names)).sum(axis=1)
    return np.stack([matched.cosine[has_query], matched.score[has_query], similarity], axis=1)
