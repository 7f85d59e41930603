"""--mode=predict: a folder of annotated pictures and one predictions.json, from the user's own photographs."""

import glob
import os
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from opendet_jax.config import Config, PredictConfig
from opendet_jax.data.images import ImageError, load_image
from opendet_jax.errors import InputError
from opendet_jax.files import replacing, write_json
from opendet_jax.predict.detector import Detector, load

PREDICTIONS = "predictions.json"


def predict_files(detector: Detector, predict: PredictConfig, out_dir: Path | str) -> list[dict[str, Any]]:
    """Detects in every image that matches `predict.inputs`; returns what predictions.json holds, one entry an image.

    An entry has file, picture (the annotated one, in `out_dir`) and the fields of `Detections.to_dict`. A file that
    cannot be read is reported on standard error, and the others go on.

    Raises:
        InputError: no file matches, none can be read, or an annotated picture would replace an input.
    """
    out_dir = Path(out_dir)
    inputs = _matching(predict.inputs)
    pictures = _picture_names(inputs)
    overwritten = {path.resolve() for path in inputs} & {(out_dir / name).resolve() for name in pictures}
    if overwritten:
        raise InputError(
            f"predict.output: pictures in {out_dir} would replace {', '.join(map(str, sorted(overwritten)))}"
        )
    entries = []
    for path, name in tqdm(list(zip(inputs, pictures, strict=True)), desc="predict", unit="image"):
        try:
            image = load_image(path)
        except ImageError as error:
            tqdm.write(f"skipped: {error}", file=sys.stderr)
            continue
        found = detector.detect(image, predict.max_detections, predict.min_score, predict.nms_iou)
        with replacing(out_dir / name) as part:
            found.draw(image).save(part, format="PNG")
        entries.append({"file": str(path), "picture": name, **found.to_dict()})
    if not entries:
        raise InputError(f"predict.inputs: none of the {len(inputs)} files that match {predict.inputs!r} is an image")
    write_json(out_dir / PREDICTIONS, entries)
    return entries


def _matching(pattern: str) -> list[Path]:
    if not pattern:
        raise InputError("predict.inputs is empty: give a path or a glob of images")
    paths = sorted(Path(name) for name in glob.glob(os.path.expanduser(pattern), recursive=True))
    files = [path for path in paths if path.is_file()]
    if not files:
        raise InputError(f"predict.inputs: no file matches {pattern!r}")
    return files


def _picture_names(inputs: list[Path]) -> list[str]:
    """name.png; where several inputs share a name, name_2.png and so on."""
    names: list[str] = []
    taken: set[str] = set()
    for path in inputs:
        name, number = f"{path.stem}.png", 1
        while name.lower() in taken:  # some file systems do not tell A.png from a.png
            number += 1
            name = f"{path.stem}_{number}.png"
        taken.add(name.lower())
        names.append(name)
    return names


def predict_from_config(config: Config, workdir: Path) -> None:
    """Annotates the images of `predict.inputs` into `predict.output`, or <workdir>/predict."""
    output = Path(config.predict.output) if config.predict.output else workdir / "predict"
    entries = predict_files(load(workdir, config.eval.checkpoint), config.predict, output)
    print(f"{len(entries)} images, {sum(len(entry['boxes']) for entry in entries)} objects: {output}")
