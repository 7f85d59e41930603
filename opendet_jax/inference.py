"""From photographs to named boxes: detect, keep the best, name only what is kept, in words of its own or given ones.

Shared by evaluation and prediction.

Method: docs/method.md#13-evaluation.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from opendet_jax.batch import Images
from opendet_jax.compilation import StoredProgram
from opendet_jax.config import Config
from opendet_jax.given_names import AlignedNames, GivenNames, SpelledNames
from opendet_jax.ops.boxes import nms, to_corners

if TYPE_CHECKING:
    from flax import linen as nn  # what runs exported programs does without

    from opendet_jax.model.beam_search import Trie
    from opendet_jax.model.encoder import Memory


@dataclass(frozen=True)
class Selection:
    """Which detections of an image are kept."""

    max_detections: int
    min_score: float
    nms_iou: float
    nms_above: int = 0  # suppression happens only in images with more queries than this; evaluation: 300


@dataclass(frozen=True)
class Found:
    """On the host, the named objects of one image, best first: what evaluation and prediction go on with."""

    boxes: Float[np.ndarray, "n 4"]  # (x0, y0, x1, y1) in pixels of the original image
    scores: Float[np.ndarray, " n"]
    names: list[list[str]]  # of each object, from best to worst beam
    name_scores: Float[np.ndarray, "n beams"]  # −∞ where there is no such name, which given names alone can lack


class _Candidates(NamedTuple):
    corners: Float[Array, "B Q 4"]  # in [0, 1] of the unpadded image
    scores: Float[Array, "B Q"]
    kept: Bool[Array, "B Q"]
    prompts: Float[Array, "B Q E"]
    agreement: Float[Array, "B Q K"]  # log σ(S) of the best of the given names, best first
    agreed: Int[Array, "B Q K"]  # places of these names; K = 0 where none are given


# A Selection's nms_iou and nms_above; the embeddings of given names, if the aligner is to compare them
Asked = tuple[tuple[float | Float[Array, ""], int | Int[Array, ""]], Float[Array | np.ndarray, "N E"] | None]
Encoded = tuple[Any, Any, Any]  # Features, Memory and Queries: what the model's first half says of a batch of images


def slots_for(valid: Bool[np.ndarray, "B Q"], sizes: Sequence[int]) -> int:
    """How many query slots the second half is given: the least of `sizes` that holds all queries of the batch, or all.

    Queries stand at the front, and empty slots have no influence, so this changes the time and nothing else.
    """
    used = int(np.flatnonzero(valid.any(axis=0)).max(initial=-1)) + 1
    return min([size for size in sizes if used <= size < valid.shape[1]], default=valid.shape[1])


CACHED = 2**17  # pixels of the images that a CPU is given at a time: the arrays of more leave its cache


class Inference:
    """A model and its parameters at work; `decode` turns one row of tokens (with start, end and padding) into a name.

    The numbers of beams and tokens, and the sizes of the programs, are those of `config.eval`. `params` and the
    `Selection` may change: nothing is compiled again.
    """

    def __init__(
        self,
        model: "nn.Module",
        params: Any,
        config: Config,
        decode: Callable[[np.ndarray], str],
        mesh: Mesh | None = None,
    ):
        """`mesh`: the devices that share the images of a batch; None: the first device alone."""
        self.config, self.model = config, model
        self._mesh = mesh or Mesh(np.array(jax.devices()[:1]), ("data",))
        self.params = params
        self._decode = decode
        # The text of all that the programs hold, where they are this package's and run on the first device.
        is_ours = all(type(x).__module__.startswith("opendet_jax.") for x in (self, model))
        is_first = list(self._mesh.devices.flat) == jax.devices()[:1]
        of = repr((model, config.eval.num_beams)) if is_ours and is_first else None
        self._encode = StoredProgram(self.on_each_device(self._first_half), of)
        self._decode_queries = StoredProgram(self._second_half, of)
        self._generate = StoredProgram(self._names, of)

    @property
    def params(self) -> Any:
        return self._params

    @params.setter
    def params(self, params: Any) -> None:
        self._params = jax.device_put(params, NamedSharding(self._mesh, PartitionSpec()))

    def on_each_device(self, function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        """`function(params, batch)`, which every device calls with its own examples; nothing is communicated.

        The arrays of the batch (from `place`) and of the result begin with the axis of examples.
        """
        whole, split = PartitionSpec(), PartitionSpec(self._mesh.axis_names)
        return jax.shard_map(function, mesh=self._mesh, in_specs=(whole, split), out_specs=split, check_vma=False)

    def place(self, batch: Any) -> Any:
        """A batch of numpy arrays, its examples dealt out to the devices; copies of the last one make them even."""

        def even(x: np.ndarray) -> np.ndarray:
            missing = -len(x) % self._mesh.size
            return np.concatenate([x, np.repeat(x[-1:], missing, axis=0)]) if missing else x

        split = NamedSharding(self._mesh, PartitionSpec(self._mesh.axis_names))
        return jax.device_put(jax.tree.map(even, batch), split)

    def __call__(
        self,
        images: Images,
        sizes: Sequence[tuple[int, int]],
        selection: Selection,
        given: GivenNames | None = None,
    ) -> list[Found]:
        """The objects of the first len(sizes) images; what else the batch holds only fills it up.

        `sizes` are the (height, width) of the original images, the frame of the boxes returned. `given`: the names to
        choose from; the score of an object is then also how well the best of them fits (given_names.py).
        """
        corners, scores, kept, prompts, agreement, agreed = self._detect(images, len(sizes), selection, given)
        chosen = [
            _best(scores[place], kept[place], selection.min_score, selection.max_detections)
            for place in range(len(sizes))
        ]
        images_of = np.repeat(np.arange(len(sizes)), [len(queries) for queries in chosen])
        rows = (images_of, np.concatenate(chosen))
        if isinstance(given, AlignedNames):
            name_scores = agreement[rows]
            names = [
                [given.names[place] for place, score in zip(places, own, strict=True) if score != -np.inf]
                for places, own in zip(agreed[rows].tolist(), name_scores, strict=True)
            ]
        else:
            names, name_scores = self.name(prompts[rows], given)
        found, start = [], 0
        for place, (queries, (height, width)) in enumerate(zip(chosen, sizes, strict=True)):
            own = slice(start, start + len(queries))
            boxes = corners[place, queries] * np.array([width, height, width, height], np.float32)
            found.append(Found(boxes, scores[place, queries], names[own], name_scores[own]))
            start = own.stop
        if isinstance(given, SpelledNames):
            return [_by_name_too(one, given, selection.min_score) for one in found]
        return found

    def _detect(
        self, images: Images, wanted: int, selection: Selection, given: GivenNames | None
    ) -> tuple[np.ndarray, ...]:
        """_Candidates of the first `wanted` images at least, on the host."""
        asked = (selection.nms_iou, selection.nms_above), given.texts if isinstance(given, AlignedNames) else None
        size = self._at_once(images)
        parts = [
            jax.tree.map(lambda x, start=start: x[start : start + size], images) for start in range(0, wanted, size)
        ]
        found = []
        # All are begun before the first is waited for: a CPU works on several side by side.
        for encoded in [self._encode(self.params, self.place(part)) for part in parts]:
            slots = slots_for(jax.device_get(encoded[-1].valid), self.config.eval.query_slots)
            found.append(self._decode_queries(self.params, asked, encoded, slots=slots))
        return _joined(jax.device_get(found))

    def _at_once(self, images: Images) -> int:
        """How many images a call of the programs is given: all, on a CPU an equal part of them that its cache holds.

        What is gained is in docs/benchmarks.md#batches-on-a-cpu.
        """
        count, height, width = images.mask.shape
        if self._mesh.size > 1 or self._mesh.devices.flat[0].platform != "cpu":
            return count
        most = max(1, CACHED // (height * width))
        return max(size for size in range(1, count + 1) if count % size == 0 and size <= most)

    def _first_half(self, params: Any, images: Images) -> Encoded:
        encoded: Any = self.model.apply({"params": params}, images, deterministic=True, method="encode")
        return encoded

    def _second_half(self, params: Any, asked: Asked, encoded: Encoded, slots: int) -> _Candidates:
        features, memory, queries = encoded
        queries = jax.tree.map(lambda x: x[:, :slots], queries)
        return self.on_each_device(self._candidates)((params, asked), (features, memory, queries))

    def _candidates(self, given: tuple[Any, Asked], encoded: Encoded) -> _Candidates:
        params, ((nms_iou, nms_above), texts) = given
        detected: Any = self.model.apply({"params": params}, *encoded, method="decode")
        corners = jnp.clip(to_corners(detected.decoded.boxes[-1].astype(jnp.float32)), 0.0, 1.0)
        scores = jax.nn.sigmoid(detected.decoded.objectness[-1].astype(jnp.float32))
        valid, prompts = detected.queries.valid, detected.prompts
        if texts is None:
            agreement, agreed = jnp.zeros((*valid.shape, 0)), jnp.zeros((*valid.shape, 0), jnp.int32)
        else:
            agreement, agreed = self._agreement(params, detected, encoded[1], jnp.asarray(texts))
            scores *= jnp.exp(agreement[..., 0])
            prompts = prompts[..., :0]  # nobody asks for them, so that nothing distils them
        alone = jax.vmap(partial(nms, iou_threshold=nms_iou))(corners, scores, valid)
        crowded = jnp.sum(valid, axis=1, keepdims=True) > nms_above
        return _Candidates(corners, scores, jnp.where(crowded, alone, valid), prompts, agreement, agreed)

    def _agreement(
        self, params: Any, detected: Any, memory: "Memory", texts: Float[Array, "N E"]
    ) -> tuple[Float[Array, "B Q K"], Int[Array, "B Q K"]]:
        """log σ(S) of the names that agree best with each query, and their places; rows of zeros are no names."""
        of_each = jnp.broadcast_to(texts, (detected.queries.valid.shape[0], *texts.shape))
        agreement: Any = self.model.apply({"params": params}, detected, memory, of_each, method="agree")
        fits = jnp.where(texts.any(axis=1), jax.nn.log_sigmoid(agreement.logits.astype(jnp.float32)), -jnp.inf)
        best, places = jax.lax.top_k(fits, min(self.config.eval.num_beams, len(texts)))
        return best, places

    def _names(
        self, params: Any, prompts: Float[Array, "R E"], trie: "Trie | None", most_tokens: int
    ) -> tuple[Array, Array]:
        def generate(shared: tuple[Any, Any], prompts: Float[Array, "R E"]) -> tuple[Array, Array]:
            params, trie = shared
            limits = (self.config.eval.num_beams, most_tokens)
            names: Any = self.model.apply({"params": params}, prompts, *limits, trie, method="generate")
            return names.tokens, names.scores

        return self.on_each_device(generate)((params, trie), prompts)

    def name(
        self, prompts: Float[np.ndarray, "n E"], given: SpelledNames | None = None
    ) -> tuple[list[list[str]], Float[np.ndarray, "n beams"]]:
        """The names of each VL-prompt and their scores, from best to worst beam; of `given` ones, where there are any.

        A beam without a name has the score −∞ and is not among the names.
        """
        limit = self.config.eval.max_new_tokens
        trie, most_tokens, decode = (
            (given.trie, given.most_tokens, given.decode) if given else (None, limit, self._decode)
        )
        names: list[list[str]] = []
        scores = [np.zeros((0, self.config.eval.num_beams), np.float32)]
        sizes = [chunk * self._mesh.size for chunk in self.config.eval.naming_chunks]
        for start in range(0, len(prompts), sizes[-1]):
            chunk = prompts[start : start + sizes[-1]]
            size = next(size for size in sizes if len(chunk) <= size)
            # Filled up with a row that is named anyway: it ends when that one does.
            padded = np.concatenate([chunk, np.repeat(chunk[-1:], size - len(chunk), axis=0)])
            generated = self._generate(self.params, self.place(padded), trie, most_tokens=most_tokens)
            tokens, beam_scores = (x[: len(chunk)] for x in jax.device_get(generated))
            names += [
                [decode(beam) for beam, score in zip(beams, own, strict=True) if score != -np.inf]
                for beams, own in zip(tokens, beam_scores, strict=True)
            ]
            scores.append(beam_scores)
        return names, np.concatenate(scores)


def _joined(parts: Sequence[_Candidates]) -> tuple[np.ndarray, ...]:
    """Those of all images; query slots that one part has more than another are empty there."""
    slots = max(part.kept.shape[1] for part in parts)

    def padded(x: np.ndarray) -> np.ndarray:
        return np.pad(x, [(0, 0), (0, slots - x.shape[1]), *[(0, 0)] * (x.ndim - 2)])

    return tuple(np.concatenate([padded(np.asarray(x)) for x in of_all]) for of_all in zip(*parts, strict=True))


def _by_name_too(found: Found, given: SpelledNames, min_score: float) -> Found:
    """With objectness × probability of the name as score, and only what still has enough."""
    lengths = np.array([given.length_of[names[0]] for names in found.names], np.float32)  # scores are means over these
    scores = found.scores * np.exp(lengths * found.name_scores[:, 0])
    order = _best(scores, np.ones(len(scores), bool), min_score, len(scores))
    return Found(found.boxes[order], scores[order], [found.names[place] for place in order], found.name_scores[order])


def _best(
    scores: Float[np.ndarray, " Q"], kept: Bool[np.ndarray, " Q"], min_score: float, limit: int
) -> Int[np.ndarray, " n"]:
    """At most `limit` queries, best first."""
    candidates = np.flatnonzero(kept & (scores >= min_score))
    return candidates[np.argsort(-scores[candidates], kind="stable")][:limit]
