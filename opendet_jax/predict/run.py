"""--mode=predict: a checkpoint of the workdir on the user's own photographs."""

from pathlib import Path

from opendet_jax.config import Config
from opendet_jax.predict.detector import load
from opendet_jax.predict.files import predict_files


def predict_from_config(config: Config, workdir: Path) -> None:
    """Annotates the images of `predict.inputs` into `predict.output`, or <workdir>/predict."""
    output = Path(config.predict.output) if config.predict.output else workdir / "predict"
    entries = predict_files(load(workdir, config.eval.checkpoint), config.predict, output)
    print(f"{len(entries)} images, {sum(len(entry['boxes']) for entry in entries)} objects: {output}")
