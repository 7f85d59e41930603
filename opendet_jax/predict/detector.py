"""The Python interface of a trained model: `load(folder).detect(image)` gives Detections."""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard, cast, overload

import numpy as np

from opendet_jax.batch import Images
from opendet_jax.compilation import enable_cache
from opendet_jax.config import Config, PredictConfig
from opendet_jax.data.images import ImageLike, load_image
from opendet_jax.data.tokenizer import load_tokenizer
from opendet_jax.data.transforms import choose, evaluation_geometry, fit, pad, transform_pixels
from opendet_jax.inference import Inference, Selection
from opendet_jax.predict.detections import Detections

if TYPE_CHECKING:
    from flax import linen as nn

_DEFAULTS = PredictConfig()


class Detector:
    """Finds and names objects.

    What is needed for the first time is compiled, and kept on disk by `load`: a program for each padded size of images
    (`config.data.buckets`), each number of query slots and each size of naming's chunks (`config.eval`).
    """

    def __init__(self, model: "nn.Module", params: Any, config: Config, decode: Callable[[np.ndarray], str]):
        self.config = config
        self._inference = Inference(model, params, config, decode)

    @overload
    def detect(
        self, images: ImageLike, max_detections: int | float = ..., min_score: float = ..., nms_iou: float = ...
    ) -> Detections: ...

    @overload
    def detect(
        self,
        images: Sequence[ImageLike],
        max_detections: int | float = ...,
        min_score: float = ...,
        nms_iou: float = ...,
    ) -> list[Detections]: ...

    def detect(
        self,
        images: ImageLike | Sequence[ImageLike],
        max_detections: int | float = _DEFAULTS.max_detections,
        min_score: float = _DEFAULTS.min_score,
        nms_iou: float = _DEFAULTS.nms_iou,
    ) -> Detections | list[Detections]:
        """The objects of one image, or a list of them for a list of images.

        Args:
            images: array (H, W, 3) of uint8 RGB or (H, W) of grey, path, PIL image, the content of a file as bytes, or
                a file opened for bytes; or a list of these.
            max_detections: the best so many are returned.
            min_score: those that score less are not.
            nms_iou: of two boxes that overlap more than this, the better one stays.

        Raises:
            TypeError, ValueError: an image of another kind, a missing or unreadable file (named), one of more than
                `config.data.max_pixels`, or a setting of another kind or out of range.
        """
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
        selection = Selection(int(max_detections), float(min_score), float(nms_iou))
        if _are_several(images):
            return [self._detect_one(image, selection) for image in images]
        return self._detect_one(cast(ImageLike, images), selection)

    def _detect_one(self, image: ImageLike, selection: Selection) -> Detections:
        """As in evaluation: same size, same bucket."""
        pixels = load_image(image, self.config.data.max_pixels)
        height, width, _ = pixels.shape
        data = self.config.data
        geometry = evaluation_geometry(height, width, data)
        bucket = data.buckets[choose(geometry.size, data.buckets)]
        padded, mask = pad(transform_pixels(pixels, replace(geometry, size=fit(geometry.size, bucket))), bucket)
        [found] = self._inference(Images(padded[None], mask[None]), [(height, width)], selection)
        return Detections.from_found(found)


def _are_several(images: ImageLike | Sequence[ImageLike]) -> TypeGuard[Sequence[ImageLike]]:
    return isinstance(images, Sequence) and not isinstance(images, str | bytes | bytearray | memoryview)


def load(folder: str | os.PathLike, checkpoint: int = -1) -> Detector:
    """The Detector of a trained model: the newest checkpoint in a workdir, or the one of a step.

    Compiled programs are kept in ~/.cache/opendet_jax (`opendet_jax.compilation`).

    Raises CheckpointError where there is none.
    """
    # Here, as both need Flax, and what runs exported programs has none.
    from opendet_jax.checkpoints.restore import restore
    from opendet_jax.model.opendet import OpenDet

    enable_cache()
    config, params, _ = restore(Path(folder), checkpoint)
    tokenizer = load_tokenizer(config.data.tokenizer, config.model.t5.vocab_size)
    return Detector(OpenDet(config.model, config.ablation), params, config, tokenizer.decode)
