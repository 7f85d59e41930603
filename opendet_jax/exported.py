"""A trained model as programs: StableHLO that jax runs without Flax, Orbax, or the code of the model.

    opendet programs DIR --out FOLDER              python -m opendet_jax.exported DIR --out FOLDER

    detector = opendet_jax.run_exported(FOLDER)    # an opendet_jax.Detector

FOLDER holds a program for each padded size of images (`config.data.buckets`), from pixels to boxes, scores and prompts;
one from prompts to names; the parameters, which are arguments of both; and what jax does not know of them, in
programs.json. docs/export.md has the order of arguments and results, and how long a program can be read.

What writes them needs Flax and the model. What runs them does not, so that none of it is imported at the head.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn, cast

import jax
import jax.export as jax_export
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from opendet_jax import __version__
from opendet_jax.batch import Images
from opendet_jax.checkpoints import intact
from opendet_jax.compilation import compiler_options, enable_cache
from opendet_jax.config import Config
from opendet_jax.config_files import at_least, parse_config
from opendet_jax.data.tokenizer import ByteTokenizer, T5Tokenizer, Tokenizer, TokenizerError, load_tokenizer
from opendet_jax.errors import InputError
from opendet_jax.files import replacing, try_folder, write_json
from opendet_jax.given_names import GivenNames
from opendet_jax.inference import Inference, Selection
from opendet_jax.predict.detector import Detector

PROGRAM = "python -m opendet_jax.exported"
PROGRAMS, PARAMETERS, TOKENIZER = "programs.json", "parameters.safetensors", "tokenizer"
PLATFORMS = ("cpu", "cuda", "tpu")
WINDOW = {"newer_months": 6, "older_weeks": 3}  # than the jaxlib that wrote them: what jax.export promises
NAMES = "name_generator/"  # begins the parameters of what names
TRAINING = ("aligner_", "denoising/")  # begins those that inference never reads
Size = tuple[int, int]  # height, width


class ProgramError(InputError):
    """A folder of exported programs that cannot be written, is damaged, or that this jax or machine cannot run."""


def file_of(size: Size) -> str:
    """Of the program for images that are padded to this height and width."""
    return f"detect_{size[0]}x{size[1]}.exported"


NAMING = "name.exported"


@dataclass(frozen=True)
class _Written:
    """A program to write: a function of the parameters, by flat names, and arrays."""

    function: Callable[..., tuple[Any, ...]]
    parameters: Mapping[str, Any]
    inputs: Mapping[str, jax.ShapeDtypeStruct]
    outputs: Sequence[str]


def write(source: Path | str, out: Path, batch_size: int | None = None) -> None:
    """Writes the programs of a model: of a workdir's newest checkpoint, converted weights, or one that comes along.

    `batch_size`: of the images of a call; None: any number. With a number the shapes of all arrays are fixed, as other
    runtimes than jax want them, and a call names the least of `config.eval.naming_chunks`.

    Raises:
        InputError: there is no such model, `out` is there or cannot be written, flatbuffers is missing, or the model's
            tokenizer cannot be read without transformers.
    """
    from opendet_jax.checkpoints.restore import restore

    _check_free(out)
    _require("flatbuffers")
    config, params, step = restore(source)
    place = Path(os.path.abspath(out))  # "." has no name
    if batch_size:
        config = replace(config, eval=replace(config.eval, naming_chunks=config.eval.naming_chunks[:1]))
    try:
        with tempfile.TemporaryDirectory(prefix=f".{place.name}.", dir=place.parent) as parent:
            part = Path(parent) / place.name
            part.mkdir()
            _write_tokenizer(config, part / TOKENIZER)
            parameters, described = _write_programs(config, params, batch_size, part)
            with replacing(part / PARAMETERS) as file:
                save_file(parameters, file, metadata={"step": str(step)})
            about = {"opendet_jax": __version__, "jax": jax.__version__, "runs_with_jaxlib": WINDOW, "step": step}
            about |= {"platforms": PLATFORMS, "batch_size": batch_size, "programs": described}
            write_json(part / PROGRAMS, {**about, "config": config.to_dict()})
            intact.write_manifest(part)
            os.replace(part, place)
    except (OSError, SafetensorError) as error:
        raise ProgramError(f"{out}: cannot be written: {getattr(error, 'strerror', None) or error}") from error


def _check_free(out: Path) -> None:
    try:
        if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
            raise ProgramError(f"{out}: is there already; give another folder")
        try_folder(out)
        Path(os.path.abspath(out)).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ProgramError(f"{out}: no programs can be written there: {error.strerror}") from error


def _require(package: str) -> None:
    if find_spec(package) is None:
        raise ProgramError(f"exported programs need the package {package}: pip install {package}")


def _write_tokenizer(config: Config, folder: Path) -> None:
    """What decodes names, as files that are read without transformers; none where names are bytes."""
    name = config.data.tokenizer
    tokenizer = load_tokenizer(name, config.model.t5.vocab_size)
    if isinstance(tokenizer, ByteTokenizer):
        return
    if isinstance(tokenizer, T5Tokenizer):
        folder.mkdir()
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(Path(name) / file, folder / file)
    else:
        cast(Any, tokenizer)._inner.save_pretrained(folder)
    if not _same(tokenizer, load_tokenizer(str(folder), config.model.t5.vocab_size)):
        raise TokenizerError(f"data.tokenizer: {name!r} cannot be read without transformers, as run_exported reads it")


def _same(tokenizer: Tokenizer, copy: Tokenizer) -> bool:
    """Whether the copy needs no transformers and spells every token as the original does."""
    some = [range(start, min(start + 100, tokenizer.size)) for start in range(0, tokenizer.size, 100)]
    return isinstance(copy, T5Tokenizer) and all(tokenizer.decode(tokens) == copy.decode(tokens) for tokens in some)


def _write_programs(
    config: Config, params: Mapping[str, Any], batch_size: int | None, folder: Path
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Writes the programs; the parameters that they need, by flat names, and what programs.json says of each."""
    from flax.traverse_util import flatten_dict

    flat: Mapping[str, Any] = flatten_dict(dict(params), sep="/")
    parameters = {
        # In C's order: safetensors writes another one as it lies, under a header that says C.
        name: np.ascontiguousarray(leaf, np.float32)
        for name, leaf in sorted(flat.items())
        if not name.startswith(TRAINING)
    }
    described: dict[str, Any] = {}
    for file, written in _programs(config, parameters, batch_size).items():
        print(f"writing {file}", flush=True)
        content = _export(written)
        with replacing(folder / file) as part:
            part.write_bytes(content)
        described[file] = {
            "parameters": sorted(written.parameters),
            "inputs": {name: f"{x.dtype}[{','.join(map(str, x.shape))}]" for name, x in written.inputs.items()},
            "outputs": list(written.outputs),
        }
    return parameters, described


def _programs(config: Config, parameters: Mapping[str, Any], batch_size: int | None) -> dict[str, _Written]:
    """By the files they go to."""
    from flax.traverse_util import unflatten_dict

    from opendet_jax.model.opendet import OpenDet

    inference = Inference(OpenDet(config.model, config.ablation), {}, config, str)

    def detect(flat, pixels, mask, nms_iou, nms_above):
        params = unflatten_dict(flat, sep="/")
        encoded = inference._first_half(params, Images(pixels, mask))
        return tuple(inference._candidates((params, ((nms_iou, nms_above), None)), encoded))[:4]

    def name(flat, prompts):
        return inference._names(unflatten_dict(flat, sep="/"), prompts, None, config.eval.max_new_tokens)

    array, settings = jax.ShapeDtypeStruct, {"nms_iou": np.float32, "nms_above": np.int32}
    images = batch_size or jax_export.symbolic_shape("b")[0]
    rows = config.eval.naming_chunks[0] if batch_size else jax_export.symbolic_shape("r")[0]
    detecting = {name: leaf for name, leaf in parameters.items() if not name.startswith(NAMES)}
    naming = {name: leaf for name, leaf in parameters.items() if name.startswith(NAMES)}
    programs = {}
    for size in config.data.buckets:
        inputs = {"pixels": array((images, *size, 3), np.uint8), "mask": array((images, *size), np.bool_)}
        inputs |= {setting: array((), dtype) for setting, dtype in settings.items()}
        programs[file_of(size)] = _Written(detect, detecting, inputs, ("boxes", "scores", "kept", "prompts"))
    prompts = {"prompts": array((rows, config.model.text_width), np.float32)}
    return {**programs, NAMING: _Written(name, naming, prompts, ("tokens", "scores"))}


def _export(written: _Written) -> bytes:
    from opendet_jax.ops.deformable_attention import without_kernels

    shapes = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in written.parameters.items()}
    with without_kernels(), _without_paths():
        program = jax_export.export(jax.jit(written.function), platforms=PLATFORMS)(shapes, *written.inputs.values())
    return bytes(program.serialize())


@contextmanager
def _without_paths() -> Iterator[None]:
    """Programs do not name the files that they were written from: where those lie is nobody's business."""
    option = "jax_traceback_in_locations_limit"
    before = jax.config.values[option]
    jax.config.update(option, 0)
    try:
        yield
    finally:
        jax.config.update(option, before)


class _Programs(Inference):
    """Inference whose two halves are programs that were read from files."""

    def __init__(self, folder: Path, about: Mapping[str, Any], config: Config, decode: Callable[[np.ndarray], str]):
        super().__init__(cast(Any, None), load_file(folder / PARAMETERS), config, decode)
        self._named = {file: program["parameters"] for file, program in about["programs"].items()}
        options = compiler_options(jax.default_backend())
        self._programs = {
            file: jax.jit(_read_program(folder / file, about), compiler_options=options) for file in about["programs"]
        }
        self._generate = lambda _params, prompts, _trie, most_tokens: self._run(NAMING, prompts)
        self._batch_size = about["batch_size"]

    def _detect(self, images: Images, wanted: int, selection: Selection, given: GivenNames | None) -> tuple[Any, ...]:
        """There are no given names. Programs of a fixed number of images get copies of the last to make it full."""
        count, height, width, _ = images.pixels.shape
        file = file_of((height, width))
        settings = np.float32(selection.nms_iou), np.int32(selection.nms_above)
        size = self._batch_size or self._at_once(images)
        parts = []
        for start in range(0, wanted, size):
            rows = np.minimum(np.arange(start, start + size), count - 1)
            batch = self.place((np.asarray(images.pixels)[rows], np.asarray(images.mask)[rows]))
            parts.append(self._run(file, *batch, *settings))
        return (*(np.concatenate(part) for part in zip(*jax.device_get(parts), strict=True)), None, None)

    def _run(self, file: str, *inputs: Any) -> Any:
        return self._programs[file]({name: self.params[name] for name in self._named[file]}, *inputs)


class _Exported(Detector):
    def __init__(self, inference: _Programs):
        self.config, self._inference, self._given = inference.config, inference, _refuse_names


def _refuse_names(names: Any, by: Any) -> NoReturn:
    raise ProgramError("names: exported programs make names up; a checkpoint's Detector can choose among given ones")


def run_exported(folder: str | os.PathLike) -> Detector:
    """The Detector of a model that `opendet programs` wrote. It needs neither Flax nor what training needs.

    Compiled programs are kept in ~/.cache/opendet_jax, as by `opendet_jax.load`.

    Raises:
        InputError: there are no programs, a file is damaged or missing, this jax cannot read them, they were not
            written for this machine's platform, or flatbuffers, or tokenizers where they are needed, is not installed.
    """
    folder = Path(folder)
    if not (folder / PROGRAMS).is_file():
        nothing = "holds no exported programs" + ("" if folder.is_dir() else " (there is no such folder)")
        raise ProgramError(f"{folder}: {nothing}; opendet programs DIR --out FOLDER writes them")
    _require("flatbuffers")
    intact.compare(folder)
    try:
        about = json.loads((folder / PROGRAMS).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ProgramError(f"{folder / PROGRAMS}: is damaged: {error}") from error
    platform = jax_export.default_export_platform()
    if platform not in about["platforms"]:
        there = ", ".join(about["platforms"])
        raise ProgramError(f"{folder}: its programs are for {there}, and this machine's platform is {platform}")
    config = parse_config(about["config"])
    has_tokenizer = (folder / TOKENIZER).is_dir()
    if has_tokenizer:
        _require("tokenizers")
    tokenizer = load_tokenizer(str(folder / TOKENIZER) if has_tokenizer else "byt5", config.model.t5.vocab_size)
    enable_cache()
    return _Exported(_Programs(folder, about, config, tokenizer.decode))


def _read_program(file: Path, about: Mapping[str, Any]) -> Callable[..., Any]:
    """Raises ProgramError where this jax cannot read the program, or the StableHLO in it."""
    try:
        program = jax_export.deserialize(bytearray(file.read_bytes()))
        program.mlir_module()
    except Exception as error:  # of many kinds: a version it no longer knows, a table without an entry
        said = next(iter(str(error).splitlines()), "")
        raise ProgramError(
            f"{file}: jax {jax.__version__} cannot read it; jax {about['jax']} wrote it, and its programs run with a "
            f"jaxlib up to {WINDOW['newer_months']} months newer or {WINDOW['older_weeks']} weeks older "
            f"({type(error).__name__}: {said})"
        ) from error
    return program.call


def parser(program: str = PROGRAM) -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog=program, description="A model as programs that need jax alone: docs/export.md.")
    top.add_argument("source", metavar="DIR", help="a workdir, a folder of converted weights, or scenes_tiny")
    top.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="to write, with all that is needed")
    top.add_argument(
        "--batch_size", type=at_least(1), metavar="N", help="fixed shapes, for other runtimes than jax; default: any"
    )
    return top


def main(arguments: Sequence[str] | None = None, program: str = PROGRAM) -> None:
    """`program`: what help and errors call it."""
    options = parser(program).parse_args(arguments)
    try:
        write(options.source, options.out, options.batch_size)
    except InputError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; nothing is written")
    size = sum(path.stat().st_size for path in options.out.rglob("*") if path.is_file())
    print(f"wrote {options.out}: {size / 2**20:.1f} MiB; opendet_jax.run_exported({str(options.out)!r}) runs it")


if __name__ == "__main__":
    main()
