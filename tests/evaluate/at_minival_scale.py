"""Evaluates made-up detections, as many as LVIS minival has at most: `python -m tests.evaluate.at_minival_scale N OUT`.

N images (minival: 4,809) with 900 boxes of 15 classes each, mapped by a made-up text encoder onto 1,203 classes. Prints
seconds, and the peak of memory before and after, in MiB.
"""

import json
import resource
import sys
import time
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from opendet_jax.config import Config, DataConfig, EvalConfig
from opendet_jax.data.formats.json_source import read_json
from opendet_jax.evaluate.loop import Naming, evaluate
from opendet_jax.evaluate.name_mapping import TextEncoderMapping
from opendet_jax.evaluate.name_similarity import REMEMBERED, RememberingEncoder
from opendet_jax.inference import Found, Inference

CLASSES, QUERIES, WORDS, WIDTH, SIDE = 1203, 900, 400, 768, 64
CONFIG = Config(
    data=DataConfig(name="minival", eval_short_side=SIDE, buckets=((SIDE, SIDE),)),
    eval=EvalConfig(pictures=0, name_mapping="text_encoder", text_encoder="made up"),
)


def encode(texts):
    """Always the same unit vector for the same text."""
    rows = np.stack([np.random.default_rng(zlib.crc32(t.encode())).standard_normal(WIDTH, np.float32) for t in texts])
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


class Inventing(Inference):
    def __init__(self):
        self._rng = np.random.default_rng(0)

    def __call__(self, images, sizes, selection, given=None):
        return [self._found() for _ in sizes]

    def _found(self) -> Found:
        low = self._rng.uniform(0, SIDE / 2, (QUERIES, 2))
        boxes = np.concatenate([low, low + self._rng.uniform(1, SIDE / 2, (QUERIES, 2))], axis=1).astype(np.float32)
        scores = np.sort(self._rng.uniform(0, 1, QUERIES).astype(np.float32))[::-1]
        words = np.minimum(self._rng.geometric(0.03, (QUERIES, 3)), WORDS).tolist()  # few words are frequent
        names = [[f"thing {word}" for word in beams] for beams in words]
        return Found(boxes, scores, names, np.zeros((QUERIES, 3), np.float32))


def write_truth(folder: Path, count: int) -> Path:
    rng = np.random.default_rng(1)
    Image.new("RGB", (SIDE, SIDE)).save(folder / "black.png")
    picture = {"file_name": "black.png", "width": SIDE, "height": SIDE, "not_exhaustive_category_ids": []}
    negative = rng.integers(1, CLASSES + 1, (count, 12)).tolist()
    images = [{**picture, "id": i, "neg_category_ids": negative[i]} for i in range(count)]
    annotations = [
        {"id": i, "image_id": i % count, "category_id": int(rng.integers(1, CLASSES + 1)), "bbox": [4, 4, 20, 20]}
        for i in range(count * 10)
    ]
    categories = [{"id": i, "name": f"class {i}", "frequency": "rcf"[i % 3]} for i in range(1, CLASSES + 1)]
    path = folder / "truth.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def main(count: int, out: Path) -> None:
    dataset, _ = read_json(write_truth(out, count), out)
    categories = [{"id": category.id, "name": category.name} for category in dataset.categories]
    naming = Naming(TextEncoderMapping(categories, RememberingEncoder(encode, WIDTH, REMEMBERED)), None)
    before, started = peak(), time.monotonic()
    evaluate(Inventing(), dataset, CONFIG, out, 0, naming)
    print(json.dumps({"seconds": round(time.monotonic() - started), "before": before, "after": peak()}))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
