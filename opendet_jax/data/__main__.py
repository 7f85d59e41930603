"""Data sets before training.

    python -m opendet_jax.data prepare --dataset visual_genome --annotations objects.json --images IMAGES --out DIR
    python -m opendet_jax.data show --config=configs/minilvis.py --out sheet.png

docs/data.md describes the commands.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from opendet_jax.config import DataConfig
from opendet_jax.config_files import at_least
from opendet_jax.data.prepared.read import SOURCES
from opendet_jax.errors import InputError

PROGRAM = "python -m opendet_jax.data"


def parser(program: str = PROGRAM) -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog=program, description="Prepare and look at data sets.")
    commands = top.add_subparsers(dest="command", required=True)

    titles = "".join(f"\n  {name:<16}{source.title}" for name, source in SOURCES.items())
    prepare = commands.add_parser(
        "prepare",
        help="annotations and images into array_record shards, for training at scale",
        description="Writes a folder to name as data.train.annotations or data.eval.annotations. Run again, it\n"
        "goes on where it was ended. Images that cannot be read are left out and listed.",
        epilog=f"data sets:{titles}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    prepare.add_argument("--dataset", required=True, choices=tuple(SOURCES), help="what it is (see below)")
    prepare.add_argument("--annotations", required=True, type=Path, metavar="PATH", help="as downloaded")
    prepare.add_argument(
        "--images", default="", metavar="DIR", help="where its archives are unpacked; a label_folder says it itself"
    )
    prepare.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to fill")
    prepare.add_argument(
        "--split",
        default="train",
        help="tfds's name for the images, and the split that is read of a label_folder (default: train)",
    )
    prepare.add_argument(
        "--name_field", default="", metavar="FIELD", help="of an annotation, with its names (default: see docs/data.md)"
    )
    prepare.add_argument("--minival", action="store_true", help="of LVIS's val only the images of COCO's val2017")
    prepare.add_argument("--workers", type=at_least(0), default=0, help="threads (default: one for each core)")
    prepare.add_argument(
        "--images_per_shard", type=at_least(0), default=0, help="default: 64 shards of 256 to 4096 images"
    )

    prepare.add_argument(
        "--tokenizer",
        default="byt5",
        metavar="T",
        help="whose tokens are to spell the names, as data.tokenizer: it is said which they do not (default: byt5)",
    )
    prepare.add_argument(
        "--max_name_tokens", type=at_least(1), default=32, help="as data.max_name_tokens (default: 32)"
    )
    prepare.add_argument(
        "--max_pixels",
        type=at_least(1),
        default=DataConfig.max_pixels,
        help="of a picture; larger ones are left out (default: %(default)s, as data.max_pixels)",
    )

    show = commands.add_parser(
        "show",
        help="training batches on a contact sheet, after augmentation, with boxes and names",
        epilog="Fields of the config are set as in training: --config.data.batch_size=4",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    show.add_argument("--config", required=True, metavar="FILE", help="a file of configs/")
    show.add_argument("--out", required=True, type=Path, metavar="SHEET.png", help="picture to write")
    show.add_argument("--images", type=at_least(1), default=16, help="how many")
    show.add_argument("--step", type=at_least(0), default=0, help="training step whose batch comes first")
    show.add_argument("--workdir", type=Path, metavar="DIR", help="a run's folder, where it has drawn its scenes")
    return top


def _prepare(options: argparse.Namespace) -> None:
    from opendet_jax.data.prepared.read import read_prepared
    from opendet_jax.data.prepared.write import Job, prepare
    from opendet_jax.data.show import describe, describe_names
    from opendet_jax.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(options.tokenizer, vocab_size=sys.maxsize)
    job = Job(
        data_set=options.dataset,
        annotations=options.annotations,
        images=options.images,
        out=options.out,
        split=options.split,
        name_field=options.name_field,
        minival=options.minival,
        images_per_shard=options.images_per_shard,
        max_pixels=options.max_pixels,
    )
    print(describe(prepare(job, options.workers)))
    records = read_prepared(options.out).records
    print(describe_names(records, tokenizer, options.tokenizer, options.max_name_tokens))
    print(f"{options.out} is complete: name it as data.train.annotations, or data.eval.annotations")


def main(arguments: Sequence[str] | None = None, program: str = PROGRAM) -> None:
    """`program`: what help and errors call it."""
    top = parser(program)
    options, fields = top.parse_known_args(arguments)
    try:
        if options.command == "prepare":
            if fields:
                top.error(f"unknown argument {fields[0]}")
            _prepare(options)
        elif options.command == "show":
            from opendet_jax.config_files import config_from_arguments
            from opendet_jax.data.show import show

            config = config_from_arguments([f"--config={options.config}", *fields])
            print(show(config, options.out, options.images, options.step, options.workdir))
    except InputError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
