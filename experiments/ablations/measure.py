"""What a trained model shows of the paper's mechanisms, on the scenes that it is evaluated on.

Of every object: its query, matched as in training (one-to-one, last layer), how well the two agree, and what the query
says. Of the alignment loss: which gradients of one query on texts of one name oppose each other (paper A.3).
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int
from numpy import ndarray
from scipy.stats import spearmanr

from opendet_jax.batch import Images, Objects
from opendet_jax.compilation import compiler_options
from opendet_jax.config import Config
from opendet_jax.data.formats.records import Dataset, Record
from opendet_jax.data.pipeline import EvaluationBatch, evaluation_batches
from opendet_jax.data.plan import Mixture
from opendet_jax.data.scene_drawing import UNSEEN
from opendet_jax.data.text_embeddings import HashedEmbedder, TextEmbedder
from opendet_jax.inference import Inference, Selection
from opendet_jax.losses.masked_alignment import masked_alignment_loss, overlapping, own_name, same_name
from opendet_jax.losses.matching import ONE_TO_ONE, Predictions, match
from opendet_jax.losses.total import clean_targets, matching_sets
from opendet_jax.model.denoising import denoising_slots, draw_randoms
from opendet_jax.model.opendet import OpenDet
from opendet_jax.ops.boxes import iou, to_centres, to_corners

SAME_IMAGES = 200  # of the training scenes with two objects of one name, those whose gradients are looked at
FOUND_AT = 0.5  # IoU from which the box of an object's query is on it
UNSEEN_NAMES = {kind.name for kind in UNSEEN}


class Matched(NamedTuple):
    """Of each object its query, −1 if it has none, and what is known of the two."""

    query: Int[Array | ndarray, "B G"]
    cosine: Float[Array | ndarray, "B G"]  # query–text alignment: the first term of Eq. 2
    score: Float[Array | ndarray, "B G"]  # the query's p
    iou: Float[Array | ndarray, "B G"]  # of the query's box and the object's
    prompts: Float[Array | ndarray, "B G E"]


class Opposed(NamedTuple):
    """Sums over a batch: of matched queries, and of their pairs with texts of the same name as their object's."""

    queries: Float[Array, ""]
    concerned: Float[Array, ""]  # queries with at least one more text of that name that the loss counts
    pairs: Float[Array, ""]
    opposing: Float[Array, ""]  # pairs whose gradient has another sign than that of the object's own text
    cancelled: Float[Array, ""]  # of the concerned queries, 1 − |Σ g| / Σ |g| over the texts of that name


class Measures:
    """Compiled once; called with the parameters of each run."""

    def __init__(self, inference: Inference, config: Config, embedder: TextEmbedder):
        self._inference, self._config, self._embedder = inference, config, embedder
        self._similar = HashedEmbedder(config.model.text_width)  # of names, whatever the model was trained with
        model: Any = inference.model
        options = compiler_options(jax.default_backend())
        self._match = jax.jit(partial(_matched, model), compiler_options=options)
        self._gradients = jax.jit(partial(_opposed, model, config), compiler_options=options)

    def __call__(self, params: Any, evaluated: Dataset, opposing_on: Mixture | None) -> dict[str, Any]:
        """`opposing_on`: scenes on which gradients are looked at, by a program of its own; None: they are not."""
        self._inference.params = params
        objects = self._objects(params, evaluated)
        opposing = {"opposing_gradients": self._opposing(params, opposing_on)} if opposing_on else {}
        changes = {"aligner_removed_changes": self._without_aligner(params, evaluated)}
        return {"objects": objects, **_summary(objects), **opposing, **changes}

    def _objects(self, params: Any, dataset: Dataset) -> dict[str, list[float]]:
        """Of every object of the data set that has a query, in the order of the data set."""
        rows: list[tuple[float, ...]] = []
        for batch, objects, shown in self._batches(dataset):
            found = jax.device_get(self._match(params, batch.images, objects))
            has_query = found.query >= 0
            true = [
                names[0]
                for record, of_image in zip(shown, has_query, strict=False)
                for names, has in zip(record.names, of_image, strict=False)
                if has
            ]
            generated = [names[0] for names in self._inference.name(found.prompts[has_query])[0]]
            similarity = (self._similar.embed(true) * self._similar.embed(generated)).sum(1)
            unseen = [name in UNSEEN_NAMES for name in true]
            right = [name == said for name, said in zip(true, generated, strict=True)]
            columns = [found.cosine[has_query], similarity, found.score[has_query], found.iou[has_query], right, unseen]
            rows += zip(*(np.asarray(column, np.float64).tolist() for column in columns), strict=True)
        names = ("cosine", "similarity", "score", "iou", "right", "unseen")
        return {
            name: [round(value, 3) for value in column]
            for name, column in zip(names, zip(*rows, strict=True), strict=True)
        }

    def _batches(self, dataset: Dataset):
        """Batches of the data set with their objects, and the records that they are of."""
        records = {record.image_id: record for record in dataset.records}
        for batch in evaluation_batches(dataset, self._config.data, self._config.eval.batch_size):
            shown = [records[image_id] for image_id in batch.image_ids[: batch.real].tolist()]
            yield batch, self._objects_of(batch, shown), shown

    def _objects_of(self, batch: EvaluationBatch, shown: list[Record]) -> Objects:
        size, slots, width = len(batch.image_ids), self._config.data.max_objects, self._config.model.text_width
        corners, valid = np.zeros((size, slots, 4), np.float32), np.zeros((size, slots), bool)
        texts = np.zeros((size, slots, width), np.float32)
        for place, record in enumerate(shown):
            count = len(record.boxes)
            corners[place, :count] = record.boxes / np.array([record.width, record.height] * 2, np.float32)
            valid[place, :count] = True
            texts[place, :count] = self._embedder.embed([names[0] for names in record.names])
        boxes = np.asarray(to_centres(jnp.asarray(corners)))
        return Objects(boxes, valid, texts, np.zeros((size, slots, 1), np.int32))

    def _opposing(self, params: Any, mixture: Mixture) -> dict[str, dict[str, dict[str, float]]]:
        """Of the alignment loss with the mask and without, for each kind of matching, on training scenes."""
        part = mixture.parts[0]
        several = [record for record in part.records if len({names[0] for names in record.names}) < len(record.names)]
        dataset = Dataset(part.annotations, tuple(several[:SAME_IMAGES]), ())
        sums: dict[str, dict[str, Opposed]] = {}
        for batch, objects, _ in self._batches(dataset):
            found = jax.device_get(self._gradients(params, batch.images, objects))
            sums = jax.tree.map(np.add, sums, found) if sums else found
        return {
            mode: {
                labels: {
                    "matched_queries": int(found.queries),
                    "share_concerned": _ratio(found.concerned, found.queries),
                    "opposing_pairs": _ratio(found.opposing, found.pairs),
                    "cancelled": _ratio(found.cancelled, found.concerned),
                }
                for labels, found in kinds.items()
            }
            for mode, kinds in sums.items()
        } | {"share_of_scenes": {"with_two_of_a_name": _ratio(len(several), len(part.records))}}

    def _without_aligner(self, params: Any, dataset: Dataset) -> int:
        """Detections of a batch that change, in box, score or name, where the aligners hold no numbers at all."""
        batch = next(iter(evaluation_batches(dataset, self._config.data, self._config.eval.batch_size)))
        sizes = [(record.height, record.width) for record in dataset.records[: len(batch.image_ids)]]
        limits = self._config.eval
        selection = Selection(limits.max_detections, limits.min_score, limits.nms_iou)
        whole = self._inference(batch.images, sizes, selection)
        self._inference.params = {
            name: jax.tree.map(lambda x: np.full_like(x, np.nan), tree) if name.startswith("aligner") else tree
            for name, tree in params.items()
        }
        without = self._inference(batch.images, sizes, selection)
        self._inference.params = params
        return sum(
            abs(len(a.scores) - len(b.scores))
            + sum(
                not (np.array_equal(box, other) and score == number and names == said)
                for box, other, score, number, names, said in zip(
                    *(a.boxes, b.boxes, a.scores, b.scores, a.names, b.names), strict=False
                )
            )
            for a, b in zip(whole, without, strict=True)
        )


def _ratio(part: float, whole: float) -> float | None:
    return round(float(part) / float(whole), 4) if whole else None


def _summary(objects: dict[str, list[float]]) -> dict[str, Any]:
    columns: dict[str, Float32[ndarray, " n"]] = {name: np.array(values) for name, values in objects.items()}
    unseen, found = columns["unseen"] > 0, columns["iou"] >= FOUND_AT
    return {
        "query_text_cosine": round(float(columns["cosine"].mean()), 4),
        "name_similarity": round(float(columns["similarity"].mean()), 4),
        "score_iou_rank_correlation": round(float(spearmanr(columns["score"], columns["iou"]).statistic), 4),
        "named_right_seen": _ratio(columns["right"][~unseen & found].sum(), (~unseen & found).sum()),
        "named_right_never_seen": _ratio(columns["right"][unseen & found].sum(), (unseen & found).sum()),
        "objects_never_seen": int((unseen & found).sum()),
    }


def _matched(model: OpenDet, params: Any, images: Images, objects: Objects) -> Matched:
    detected, agreement = model.apply({"params": params}, images, objects.texts, method="detect_and_align")
    boxes, objectness = detected.decoded.boxes[-1:], detected.decoded.objectness[-1:]
    predictions = Predictions(boxes, objectness, agreement.logits[None], detected.queries.valid[None])
    query = match(predictions, clean_targets(objects), ONE_TO_ONE).query[0, :, 0]
    place = jnp.maximum(query, 0)

    def own(x: Float[Array, "B Q G"]) -> Float[Array, "B G"]:
        return jnp.take_along_axis(x.swapaxes(1, 2), place[..., None], axis=2)[..., 0]

    def of_query(x: Float[Array, "B Q n"]) -> Float[Array, "B G n"]:
        return jnp.take_along_axis(x, place[..., None], axis=1)

    overlap = iou(to_corners(of_query(boxes[0])), to_corners(jnp.asarray(objects.boxes)))
    score = jax.nn.sigmoid(jnp.take_along_axis(objectness[0], place, axis=1))
    return Matched(query, own(agreement.cosine), score, overlap, of_query(detected.prompts))


def _opposed(
    model: OpenDet, config: Config, params: Any, images: Images, objects: Objects
) -> dict[str, dict[str, Opposed]]:
    """Of the gradients of the loss in its logits S, summed over the layers of a kind."""
    count, slots = objects.valid.shape
    randoms = draw_randoms(
        jax.random.key(0), count, denoising_slots(config.model, slots), config.model.denoising_labels
    )
    training = model.apply({"params": params}, images, objects, randoms, deterministic=True)
    targets = clean_targets(objects)
    same = same_name(targets.texts, targets.valid, config.loss.name_mask_threshold)
    found: dict[str, dict[str, Opposed]] = {}
    for mode, (_, predictions) in matching_sets(training, targets, config.model, config.ablation).items():
        matched = match(predictions, targets, mode).object

        def of_set(p: Predictions, matched, labels, mode=mode) -> Opposed:
            counted = p.valid[:, :, None] & targets.valid[:, None]
            if mode == ONE_TO_ONE:
                counted &= overlapping(p.boxes, targets.boxes)
            gradient = jax.grad(masked_alignment_loss)(p.alignment, matched, labels, counted)
            return _opposed_pairs(gradient, matched, same, counted)

        kinds = {"with_mask": same, "without_mask": own_name(targets.valid)}
        name = "one_to_one" if mode == ONE_TO_ONE else "one_to_many"
        found[name] = {
            kind: jax.tree.map(jnp.sum, jax.vmap(of_set, in_axes=(0, 0, None))(predictions, matched, labels))
            for kind, labels in kinds.items()
        }
    return found


def _opposed_pairs(
    gradient: Float[Array, "B Q G"],
    matched: Int[Array, "B Q"],
    same: Bool[Array, "B G G"],
    counted: Bool[Array, "B Q G"],
) -> Opposed:
    place = jnp.maximum(matched, 0)[..., None]
    own = jnp.take_along_axis(gradient, place, axis=2)
    of_name = jnp.take_along_axis(same, place, axis=1) & counted & (matched >= 0)[..., None]
    has_own = jnp.take_along_axis(of_name, place, axis=2)  # the loss counts the object itself
    others = of_name & (jnp.arange(gradient.shape[-1]) != place) & has_own
    concerned = others.any(-1)
    total = jnp.where(of_name, gradient, 0.0)
    cancelled = 1.0 - jnp.abs(total.sum(-1)) / jnp.maximum(jnp.abs(total).sum(-1), 1e-30)
    return Opposed(
        queries=(matched >= 0).sum().astype(jnp.float32),
        concerned=concerned.sum().astype(jnp.float32),
        pairs=others.sum().astype(jnp.float32),
        opposing=(others & (gradient * own < 0)).sum().astype(jnp.float32),
        cancelled=jnp.where(concerned, cancelled, 0.0).sum(),
    )
