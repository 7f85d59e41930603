"""Evaluates a small random model on 1, 2 and 4 devices: `python -m tests.evaluate.on_devices DATASET.json OUT`.

Results lie in OUT/1, OUT/2 and OUT/4. With each is alignment.npy, the analysis of a scripted model on its own pictures.
XLA_FLAGS=--xla_force_host_platform_device_count=4 makes the devices.
"""

import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from opendet_jax.config import Config, DataConfig, EvalConfig
from opendet_jax.data.formats.json_source import read_json
from opendet_jax.data.text_embeddings import HashedEmbedder
from opendet_jax.evaluate.alignment import analyse
from opendet_jax.evaluate.loop import evaluate
from opendet_jax.evaluate.name_similarity import EmbeddedNames
from opendet_jax.inference import Inference
from opendet_jax.model.opendet import OpenDet, init_params
from tests.evaluate import test_alignment
from tests.model.conftest import SHALLOW

DEVICES = (1, 2, 4)
CONFIG = Config(
    model=SHALLOW,
    data=DataConfig(name="toy", eval_short_side=64, max_long_side=64, buckets=((64, 64),)),
    eval=EvalConfig(batch_size=3, max_new_tokens=3, pictures=0),
)


def random_params(model: OpenDet) -> dict:
    """Random numbers everywhere, scales of norms around 1; not the ones training starts from, which take longer."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        return (rng.normal(path[-1].key == "scale", 0.1, leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(lambda: init_params(model, jax.random.key(0))))


def decode(tokens) -> str:
    return "cat" if tokens[1] % 2 else " ".join(map(str, tokens))


def main(annotations: Path, out: Path) -> None:
    assert jax.device_count() == DEVICES[-1]
    dataset, _ = read_json(annotations, annotations.parent)
    (out / "world").mkdir()
    world = test_alignment.write_world(out / "world")
    model = OpenDet(CONFIG.model)
    params = random_params(model)
    for count in DEVICES:
        mesh = Mesh(jax.devices()[:count], ("data",))
        inference = Inference(model, params, CONFIG, decode, mesh)
        evaluate(inference, dataset, CONFIG, out / str(count), step=0)
        config = replace(test_alignment.CONFIG, eval=replace(test_alignment.CONFIG.eval, batch_size=3))
        texts = EmbeddedNames(HashedEmbedder(test_alignment.E), "hashed")
        found = analyse(test_alignment.scripted(mesh), world, config, texts)
        np.save(out / str(count) / "alignment.npy", np.stack([found.cosine, found.score, found.similarity]))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
