"""The Python interface of a trained model: `load(folder).detect(image)` gives Detections."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard, cast, overload

import numpy as np
from jaxtyping import Bool, UInt8

from opendet_jax.batch import Images
from opendet_jax.compilation import enable_cache
from opendet_jax.config import Config, PredictConfig
from opendet_jax.data.images import ImageLike, load_image
from opendet_jax.data.tokenizer import load_tokenizer
from opendet_jax.data.transforms import choose, evaluation_geometry, fit, pad, transform_pixels
from opendet_jax.given_names import By, GivenNames, given_names
from opendet_jax.inference import Inference, Selection
from opendet_jax.predict.detections import Detections

if TYPE_CHECKING:
    from flax import linen as nn

_DEFAULTS = PredictConfig()
READ_AHEAD = 4  # batches of images that a stream takes before it gives the first back


class _Fitted(NamedTuple):
    """An image as the model takes it, padded to the bucket."""

    bucket: tuple[int, int]
    pixels: UInt8[np.ndarray, "H W 3"]
    mask: Bool[np.ndarray, "H W"]
    size: tuple[int, int]  # height and width of what was given


class Detector:
    """Finds and names objects.

    What is needed for the first time is compiled, and kept on disk by `load`: a program for each padded size of images
    (`config.data.buckets`), alone and in a batch, each number of query slots and each size of naming's chunks
    (`config.eval`).
    """

    def __init__(self, model: "nn.Module", params: Any, config: Config, decode: Callable[[np.ndarray], str]):
        self.config = config
        self._inference = Inference(model, params, config, decode)
        self._given = lru_cache(maxsize=8)(partial(given_names, config=config))

    @overload
    def detect(
        self,
        images: ImageLike,
        max_detections: int | float = ...,
        min_score: float = ...,
        nms_iou: float = ...,
        *,
        names: Sequence[str] | None = ...,
        by: By = ...,
        batch_size: int = ...,
    ) -> Detections: ...

    @overload
    def detect(
        self,
        images: Sequence[ImageLike],
        max_detections: int | float = ...,
        min_score: float = ...,
        nms_iou: float = ...,
        *,
        names: Sequence[str] | None = ...,
        by: By = ...,
        batch_size: int = ...,
    ) -> list[Detections]: ...

    def detect(
        self,
        images: ImageLike | Sequence[ImageLike],
        max_detections: int | float = _DEFAULTS.max_detections,
        min_score: float = _DEFAULTS.min_score,
        nms_iou: float = _DEFAULTS.nms_iou,
        *,
        names: Sequence[str] | None = None,
        by: By = _DEFAULTS.by,
        batch_size: int = _DEFAULTS.batch_size,
    ) -> Detections | list[Detections]:
        """The objects of one image, or a list of them for a list of images.

        Args:
            images: a path, the content of a file as bytes, a file opened for bytes, a PIL image, an array of RGB or
                grey (docs/python.md#what-may-be-an-image); or a list of these.
            max_detections: the best so many are returned; with `names` by language, so many are named.
            min_score: those that score less are not.
            nms_iou: of two boxes that overlap more than this, the better one stays.
            names: the names to choose from; None: the model makes them up. What is none of them scores low.
            by: how it chooses: "language" lets the name generator write one of them, "alignment" compares an object
                with their text embeddings (opendet_jax/given_names.py).
            batch_size: images of one padded size that are detected together; memory grows with it.

        Raises:
            TypeError, ValueError: an image of another kind, a missing or unreadable file (named), one of more than
                `config.data.max_pixels`, or a setting of another kind or out of range.
            InputError: a name without a text embedding, or two that the language model cannot tell apart.
        """
        settings = {"names": names, "by": by, "batch_size": batch_size}
        if _are_several(images):
            return list(self.detect_stream(images, max_detections, min_score, nms_iou, **settings))
        [found] = self.detect_stream([cast(ImageLike, images)], max_detections, min_score, nms_iou, **settings)
        return found

    def detect_stream(
        self,
        images: Iterable[ImageLike],
        max_detections: int | float = _DEFAULTS.max_detections,
        min_score: float = _DEFAULTS.min_score,
        nms_iou: float = _DEFAULTS.nms_iou,
        *,
        names: Sequence[str] | None = None,
        by: By = _DEFAULTS.by,
        batch_size: int = _DEFAULTS.batch_size,
    ) -> Iterator[Detections]:
        """`detect` for images that come one after the other, of a video say: their Detections in the same order.

        A batch is detected when there are enough images of one padded size. At most 4 × `batch_size` images are taken
        whose Detections have not been given back; with `batch_size=1` each is answered before the next is taken.
        What is wrong with a setting is raised by the call, with an image when it is its turn.
        """
        selection = _selection(max_detections, min_score, nms_iou)
        if isinstance(batch_size, bool) or not isinstance(batch_size, int | np.integer):
            raise TypeError(f"batch_size is a whole number, not {batch_size!r:.40}")
        if batch_size < 1:
            raise ValueError(f"batch_size is at least 1, not {batch_size}")
        given = None if names is None else self._given(names if isinstance(names, str) else tuple(names), by)
        return self._in_order(map(self._fitted, images), selection, given, int(batch_size))

    def _fitted(self, image: ImageLike) -> _Fitted:
        """As in evaluation: same size, same bucket."""
        data = self.config.data
        pixels = load_image(image, data.max_pixels)
        height, width, _ = pixels.shape
        geometry = evaluation_geometry(height, width, data)
        bucket = data.buckets[choose(geometry.size, data.buckets)]
        padded, mask = pad(transform_pixels(pixels, replace(geometry, size=fit(geometry.size, bucket))), bucket)
        return _Fitted(bucket, padded, mask, (height, width))

    def _in_order(
        self, images: Iterator[_Fitted], selection: Selection, given: GivenNames | None, batch_size: int
    ) -> Iterator[Detections]:
        done: dict[int, Detections] = {}
        following = 0
        for batch in in_batches(images, batch_size):
            found = self._detect_batch(list(batch.values()), selection, given, batch_size)
            done |= zip(batch, found, strict=True)
            while following in done:
                yield done.pop(following)
                following += 1

    def _detect_batch(
        self, images: list[_Fitted], selection: Selection, given: GivenNames | None, batch_size: int
    ) -> list[Detections]:
        """Of one bucket: in one batch, filled up with the last of them, or alone where that would be mostly filling."""
        if len(images) > 1 and 2 * len(images) < batch_size:
            return [found for image in images for found in self._detect_batch([image], selection, given, 1)]
        filled = images + images[-1:] * (batch_size - len(images) if len(images) > 1 else 0)
        batch = Images(np.stack([image.pixels for image in filled]), np.stack([image.mask for image in filled]))
        found = self._inference(batch, [image.size for image in images], selection, given)
        return [Detections.from_found(one) for one in found]


def in_batches(images: Iterable[_Fitted], size: int) -> Iterator[dict[int, _Fitted]]:
    """Images of one bucket, with their numbers: `size` of them, or fewer where the oldest has waited long enough.

    That is when READ_AHEAD × `size` images have come since, or no more do.
    """
    waiting: dict[tuple[int, int], dict[int, _Fitted]] = {}
    for number, image in enumerate(images):
        alike = waiting.setdefault(image.bucket, {})
        alike[number] = image
        oldest = min(waiting, key=lambda bucket: next(iter(waiting[bucket])))
        if len(alike) == size:
            yield waiting.pop(image.bucket)
        elif number - next(iter(waiting[oldest])) >= READ_AHEAD * size - 1:
            yield waiting.pop(oldest)
    yield from waiting.values()


def _selection(max_detections: int | float, min_score: float, nms_iou: float) -> Selection:
    for name, value in (("max_detections", max_detections), ("min_score", min_score), ("nms_iou", nms_iou)):
        if not isinstance(value, int | float | np.integer | np.floating):
            raise TypeError(f"{name} is a number, not {type(value).__name__}")
    if not max_detections >= 1:
        raise ValueError(f"max_detections is at least 1, not {max_detections}")
    if max_detections != max_detections // 1:
        raise TypeError(f"max_detections is a whole number, not {max_detections}")
    for name, value in (("min_score", min_score), ("nms_iou", nms_iou)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is between 0 and 1, not {value}")
    return Selection(int(max_detections), float(min_score), float(nms_iou))


def _are_several(images: ImageLike | Sequence[ImageLike]) -> TypeGuard[Sequence[ImageLike]]:
    return isinstance(images, Sequence) and not isinstance(images, str | bytes | bytearray | memoryview)


def load(folder: str | os.PathLike, checkpoint: int = -1) -> Detector:
    """The Detector of a trained model: the newest checkpoint in a workdir, or the one of a step.

    Also of a portable model, of one on the Hugging Face hub (hf://user/model, hf://user/model@revision), and of
    scenes_tiny, which comes along. Compiled programs are kept in ~/.cache/opendet_jax (`opendet_jax.compilation`).

    Raises CheckpointError where there is none, WeightsError where the hub does not give it.
    """
    return load_with(folder, checkpoint, lambda saved: saved)


def load_with(folder: str | os.PathLike, checkpoint: int, choose: Callable[[Config], Config]) -> Detector:
    """The same, with the config that `choose` makes of the one that the model was saved with."""
    # Here, as both need Flax, and what runs exported programs has none.
    from opendet_jax.checkpoints.restore import restore
    from opendet_jax.model.opendet import OpenDet

    enable_cache()
    saved, params, _ = restore(Path(folder), checkpoint)
    config = choose(saved)
    tokenizer = load_tokenizer(config.data.tokenizer, config.model.t5.vocab_size)
    return Detector(OpenDet(config.model, config.ablation), params, config, tokenizer.decode)
