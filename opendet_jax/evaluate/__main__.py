"""Score a results file.

    python -m opendet_jax.evaluate --annotations A.json --predictions P.json --out DIR
    python -m opendet_jax.evaluate --annotations A.json --predictions P.json --protocol coco --images IMAGES --out DIR

docs/evaluate.md describes the files read and written, the numbers, and has the commands for each data set.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from opendet_jax.errors import InputError
from opendet_jax.evaluate.evaluator import Protocol

PROGRAM = "python -m opendet_jax.evaluate"


def parser(program: str = PROGRAM) -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog=program,
        description="Score detections of any program: average precision, finding and naming apart, tables, pictures.",
    )
    top.add_argument(
        "--annotations",
        required=True,
        type=Path,
        metavar="A",
        help="the truth: a json in the form of LVIS or COCO, or a YOLO or VOC folder",
    )
    top.add_argument(
        "--predictions",
        required=True,
        type=Path,
        metavar="P",
        help="a json list of {image_id, category_id, bbox: [x, y, width, height], score}; names, where boxes have them",
    )
    top.add_argument(
        "--protocol",
        choices=get_args(Protocol),
        default="lvis",
        help="lvis and lvis_fixed compute the same, LVIS AP and fixed AP: it says of which the pictures are; "
        "coco: pycocotools' numbers (default: lvis)",
    )
    top.add_argument(
        "--out", type=Path, metavar="DIR", help="folder to write (default: that of P, with “_scores” after P's name)"
    )
    top.add_argument("--images", type=Path, metavar="DIR", help="the photographs: draws the best and the worst")
    top.add_argument("--minival", action="store_true", help="of LVIS's val only the images of COCO's val2017")
    top.add_argument(
        "--clip_truth",
        action="store_true",
        help="clip true boxes to their pictures, as in training; leave out those outside",
    )
    top.add_argument("--only_predicted", action="store_true", help="leave out images that have no detection in P")
    return top


def main(arguments: Sequence[str] | None = None, program: str = PROGRAM) -> None:
    """`program`: what help and errors call it."""
    options = parser(program).parse_args(arguments)
    from opendet_jax.evaluate.report import METRICS, score_file

    out = options.out or options.predictions.with_name(f"{options.predictions.stem}_scores")
    before = _changed(out / METRICS)
    try:
        score_file(
            annotations=options.annotations,
            predictions=options.predictions,
            protocol=options.protocol,
            out=out,
            images=options.images,
            minival=options.minival,
            clip_truth=options.clip_truth,
            only_predicted=options.only_predicted,
        )
    except (InputError, OSError) as error:  # OSError: the folder cannot be written
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        written = _changed(out / METRICS) != before
        sys.exit(f"stopped: {f'all numbers are in {out}, not all pictures' if written else 'nothing is written'}")


def _changed(path: Path) -> int:
    """When a file was last written; 0 where there is none."""
    return path.stat().st_mtime_ns if path.is_file() else 0


if __name__ == "__main__":
    main()
