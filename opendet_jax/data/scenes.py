"""Generated scenes as a data set: the embedded default, which needs no download.

Coloured shapes on textured backgrounds (scene_drawing.py), written as JPEGs and a json in the form of LVIS v1 with a
fourth frequency group "u", the names that training never sees.

    python -m opendet_jax.data.scenes --out DIR --images 4000 --seed 0
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from tqdm import tqdm

from opendet_jax.config_files import at_least
from opendet_jax.data.scene_drawing import KINDS, SPLITS, SceneObject, Split, draw_scene
from opendet_jax.errors import InputError

JPEG_QUALITY = 92
SMALLEST = 32  # pixels a side

# A category is rare below 2.5 % of the training images and frequent from 6 % on, whatever their number.
RARE_BELOW, FREQUENT_FROM = 0.025, 0.06


def generate(
    out: str | Path,
    images: int,
    seed: int,
    size: int = 128,
    split: Split = "train",
    frequencies_from: str | Path | None = None,
    progress: bool = True,
) -> Path:
    """Draw a set, or reuse it: the path of `annotations.json` in a folder of `out` named after the parameters.

    The pictures lie in `images` beside it. A complete set is reused; otherwise it is made in a temporary folder and
    renamed, so that a set is whole or absent. `frequencies_from` names the training json whose image counts and
    frequency groups the categories carry; without it they are counted in this set.
    """
    if images < 1 or size < SMALLEST:
        raise ValueError(
            f"scenes need at least 1 image of at least {SMALLEST} pixels, got images={images}, size={size}"
        )
    folder = f"{split}_{images}x{size}px_seed{seed}"
    if frequencies_from is not None:
        folder += f"_for_{Path(frequencies_from).resolve().parent.name}"
    target = Path(out) / folder
    if _complete(target, images):
        return target / "annotations.json"
    counts = _counted(frequencies_from) if frequencies_from is not None else None
    Path(out).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".scenes_", dir=out) as temporary:
        made = Path(temporary) / folder
        (made / "images").mkdir(parents=True)
        found: list[list[SceneObject]] = []
        for index in tqdm(range(images), desc=f"{split} scenes", unit="image", mininterval=0.5, disable=not progress):
            pixels, objects = draw_scene(seed, split, index, size)
            Image.fromarray(pixels).save(made / "images" / _file_name(index), quality=JPEG_QUALITY)
            found.append(objects)
        content = _lvis(found, counts, {"split": split, "images": images, "seed": seed, "size": size})
        (made / "annotations.json").write_text(json.dumps(content))
        _move(made, target, images)
    return target / "annotations.json"


def _move(made: Path, target: Path, images: int) -> None:
    if target.exists() and not _complete(target, images):
        shutil.rmtree(target)
    try:
        made.rename(target)
    except OSError:
        if not _complete(target, images):  # unless another process was quicker
            raise


def _complete(folder: Path, images: int) -> bool:
    return (folder / "annotations.json").is_file() and len(list((folder / "images").glob("*.jpg"))) == images


def _file_name(index: int) -> str:
    return f"{index:06d}.jpg"


class SceneError(InputError):
    """A set that cannot be drawn."""


class _Counts(NamedTuple):
    images: int  # of the training set
    images_of: dict[str, int]  # by category name
    instances_of: dict[str, int]


def _counted(annotations: str | Path) -> _Counts:
    try:
        content = json.loads(Path(annotations).read_text(encoding="utf-8"))
        by_name = {c["name"]: c for c in content["categories"]}
        return _Counts(
            len(content["images"]),
            {name: c["image_count"] for name, c in by_name.items()},
            {name: c["instance_count"] for name, c in by_name.items()},
        )
    except OSError as error:
        raise SceneError(f"{annotations}: cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise SceneError(f"{annotations}: is not the json of a drawn set: {error!r}") from error


def frequency(image_count: int, images: int) -> str:
    """LVIS's letter for a category seen in `image_count` of `images` training images, or "u"."""
    if image_count == 0:
        return "u"
    share = image_count / images
    return "r" if share < RARE_BELOW else "c" if share < FREQUENT_FROM else "f"


def _lvis(found: Sequence[Sequence[SceneObject]], counts: _Counts | None, info: dict[str, Any]) -> dict[str, Any]:
    """The set in LVIS v1 form; category ids are 1 + the index in `KINDS`, image ids 1 + the index of the picture."""
    if counts is None:
        images_of = Counter(KINDS[k].name for objects in found for k in {o.kind for o in objects})
        instances_of = Counter(KINDS[o.kind].name for objects in found for o in objects)
        counts = _Counts(len(found), images_of, instances_of)
    categories = [
        {
            "id": i,
            "name": kind.name,
            "synonyms": [kind.name],
            "def": kind.definition,
            "image_count": counts.images_of.get(kind.name, 0),
            "instance_count": counts.instances_of.get(kind.name, 0),
            "frequency": frequency(counts.images_of.get(kind.name, 0), counts.images),
        }
        for i, kind in enumerate(KINDS, 1)
    ]
    images = [
        {
            "id": i,
            "file_name": _file_name(i - 1),
            "width": info["size"],
            "height": info["size"],
            "neg_category_ids": sorted(set(range(1, len(KINDS) + 1)) - {o.kind + 1 for o in objects}),
            "not_exhaustive_category_ids": [],
        }
        for i, objects in enumerate(found, 1)
    ]
    pairs = [(i, o) for i, objects in enumerate(found, 1) for o in objects]
    annotations = [
        {
            "id": n,
            "image_id": i,
            "category_id": o.kind + 1,
            "bbox": list(o.box),
            "area": o.area,
            "segmentation": [],
        }
        for n, (i, o) in enumerate(pairs, 1)
    ]
    return {"info": info, "categories": categories, "images": images, "annotations": annotations}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m opendet_jax.data.scenes",
        description="Draw a data set of coloured shapes with LVIS-format annotations. Prints the path of its json.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", required=True, help="folder in which the set's own folder is made")
    parser.add_argument("--images", type=at_least(1), default=4000, help="number of pictures")
    parser.add_argument("--seed", type=at_least(0), default=0, help="picture i depends on seed, split, i and size only")
    parser.add_argument("--size", type=at_least(SMALLEST), default=128, help="pixels a side")
    parser.add_argument(
        "--split", choices=SPLITS, default="train", help="val: all names equally often, unseen ones too"
    )
    parser.add_argument(
        "--frequencies_from",
        metavar="TRAIN_JSON",
        help="training json whose frequency groups the categories carry (default: counted in this set)",
    )
    options = parser.parse_args(arguments)
    try:
        print(generate(**vars(options)))
    except InputError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: --out {options.out}: cannot be written: {error.strerror or error}")


if __name__ == "__main__":
    main()
