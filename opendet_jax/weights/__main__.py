"""Weights of others in, ours out.

    python -m opendet_jax.weights convert --from opendet|swin|t5|clip --source X --out DIR
    python -m opendet_jax.weights inspect X
    python -m opendet_jax.weights export DIR --to opendet|swin|swin_hugging_face|t5 --out FILE.safetensors
    python -m opendet_jax.weights export DIR --to portable --out FOLDER
    python -m opendet_jax.weights push DIR user/model --licence LICENCE
    python -m opendet_jax.weights pull user/model FOLDER
    python -m opendet_jax.weights embed-names --annotations JSON… --encoder DIR --out table.npy

docs/weights.md has a command for each published source.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from opendet_jax.checkpoints.folder import KINDS
from opendet_jax.compilation import enable_cache
from opendet_jax.errors import InputError
from opendet_jax.weights.convert import LAYOUTS

PROGRAM = "python -m opendet_jax.weights"
PORTABLE = "portable"


def parser(program: str = PROGRAM) -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog=program, description="Convert and look at weights.")
    commands = top.add_subparsers(dest="command", required=True)

    convert = commands.add_parser("convert", help="PyTorch weights into a folder of ours")
    convert.add_argument("--from", dest="kind", choices=KINDS, required=True, help="what the source is")
    convert.add_argument(
        "--source", required=True, metavar="X", help=".safetensors, .pth, .pt, .bin, a folder, or a name on the hub"
    )
    convert.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write")
    convert.add_argument(
        "--tokenizer",
        default="",
        metavar="T",
        help="folder or hub name; default: of clip that beside the source, of opendet Flan-T5's; swin and t5 have none",
    )
    convert.add_argument("--licence", default="", help="to note, where the source's model card does not say it")

    inspect = commands.add_parser("inspect", help="names, shapes, counts and sizes of weights, theirs or ours")
    inspect.add_argument("source", metavar="X", help="anything that convert reads, or a folder that it wrote")
    inspect.add_argument("--all", action="store_true", help="every tensor, not only the modules")

    export = commands.add_parser("export", help="our weights under PyTorch names, or as a folder to give away")
    export.add_argument("folder", metavar="DIR", help="a folder that convert wrote, a workdir, or hf://user/model")
    export.add_argument("--to", dest="layout", choices=(*LAYOUTS, PORTABLE), required=True, help="whose names")
    export.add_argument("--out", required=True, type=Path, metavar="X", help=".safetensors or .pth; portable: a folder")
    export.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of a portable model's numbers"
    )

    push = commands.add_parser("push", help="a model to the Hugging Face hub, in one commit")
    push.add_argument("folder", metavar="DIR", help="a workdir (its newest checkpoint), or a portable model's folder")
    push.add_argument("name", metavar="USER/MODEL", help="the repository; it is made where there is none")
    push.add_argument(
        "--licence", required=True, help="of the model, as the hub spells it: apache-2.0, mit, cc-by-4.0, other …"
    )
    push.add_argument("--private", action="store_true", help="a repository that is made is private")
    push.add_argument("--revision", default="", metavar="BRANCH", help="default: main; it is made where there is none")

    pull = commands.add_parser("pull", help="a model from the Hugging Face hub into a folder")
    pull.add_argument("name", metavar="USER/MODEL", help="user/model, or user/model@revision")
    pull.add_argument("out", type=Path, metavar="FOLDER", help="new, or empty")

    embed = commands.add_parser("embed-names", help="a table of text embeddings for training and evaluation")
    names = embed.add_mutually_exclusive_group(required=True)
    names.add_argument("--names", type=Path, metavar="FILE", help="a name a line, or a json list")
    names.add_argument(
        "--annotations", nargs="+", metavar="JSON", help="the names that training reads there: any form of docs/data.md"
    )
    embed.add_argument(
        "--name_field",
        nargs="+",
        default=[],
        metavar="FIELD",
        help="the data sets' name_field: one for all annotations, or one for each ('' for none)",
    )
    embed.add_argument("--encoder", required=True, type=Path, metavar="DIR", help="CLIP, converted")
    embed.add_argument("--tokenizer", default="", metavar="T", help="where DIR holds none: a folder or hub name")
    embed.add_argument("--out", required=True, type=Path, metavar="TABLE.npy", help="rows; the names go beside it")
    return top


def main(arguments: Sequence[str] | None = None, program: str = PROGRAM) -> None:
    """`program`: what help and errors call it."""
    options = parser(program).parse_args(arguments)
    enable_cache()
    try:
        if options.command == "convert":
            from opendet_jax.weights.commands import convert_command

            convert_command(options.kind, options.source, options.out, options.tokenizer, options.licence)
        elif options.command == "inspect":
            from opendet_jax.weights.commands import inspect_command

            inspect_command(options.source, options.all)
        elif options.command == "export":
            from opendet_jax.weights.commands import export_command, portable_command

            if options.layout == PORTABLE:
                portable_command(options.folder, options.out, options.dtype)
            elif options.dtype != "float32":
                raise InputError(f"--dtype {options.dtype}: belongs to --to {PORTABLE}")
            else:
                export_command(options.folder, options.layout, options.out)
        elif options.command == "push":
            from opendet_jax.weights.commands import push_command

            push_command(options.folder, options.name, options.licence, options.private, options.revision)
        elif options.command == "pull":
            from opendet_jax.weights.commands import pull_command

            pull_command(options.name, options.out)
        else:
            from opendet_jax.weights.commands import embed_command

            if options.name_field and not options.annotations:
                raise InputError("--name_field: belongs to --annotations")
            annotations, fields = options.annotations or [], options.name_field
            embed_command(options.names, annotations, fields, options.encoder, options.tokenizer, options.out)
    except InputError as error:
        sys.exit(f"error: {error}")
    except OSError as error:  # a disk that is full, a file that vanishes
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
