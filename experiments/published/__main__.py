"""The authors' weights on LVIS minival, and their row in docs/results.md, in one command:

    python -m experiments.published --checkpoint model_0299999.pth --lvis DIR --coco DIR

It converts the checkpoint and CLIP's text tower, evaluates as the paper does (docs/evaluate.md), and writes what comes
out beside what is published. Started again it goes on after what is complete: each conversion, and the evaluation as a
whole. Fields of the config that a machine needs may be given, as --config.eval.batch_size=1; the row names them.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import logging

from benchmarks.__main__ import machine
from opendet_jax import main as program
from opendet_jax.checkpoints.folder import NOTE, TOKENIZER, check_free, read_config, read_note
from opendet_jax.checkpoints.same_config import as_written, in_evaluation
from opendet_jax.compilation import enable_cache, give_back_memory
from opendet_jax.config import Config, DatasetPaths
from opendet_jax.config_files import CONFIGS, at_least, config_from_arguments, parse_config, validate
from opendet_jax.data.datasets import read_annotations
from opendet_jax.data.images import check_present
from opendet_jax.data.pixels import ImageError
from opendet_jax.data.tokenizer import TokenizerError, load_tokenizer
from opendet_jax.errors import InputError, WeightsError
from opendet_jax.evaluate.loop import METRICS, results_folder
from opendet_jax.files import replacing, write_json
from opendet_jax.weights.commands import convert_command
from opendet_jax.weights.convert import ANCHORS, opendet_config
from opendet_jax.weights.embed_names import open_tokenizer
from opendet_jax.weights.source import checksum, read_source
from opendet_jax.weights.unwrap import without_wrapper

PAGE = Path("docs/results.md")
BEGIN, END = "<!-- published -->\n", "<!-- /published -->\n"
ANNOTATIONS = "lvis_v1_val.json"
MINIVAL = 4809  # images
CLIP = "openai/clip-vit-large-patch14-336"  # the paper's text encoder
RECORD = "published.json"  # beside metrics.json: what was evaluated, where and when
OURS = ("data.eval.", "data.name", "data.source", "eval.name_mapping", "eval.text_encoder", "eval.checkpoint")
OURS += ("eval.limit", "eval.names", "eval.given_by")  # fields that make it the paper's evaluation
ROOT = Path(__file__).parents[2]


class Published(NamedTuple):
    """A row of the paper's table 1: fixed AP on LVIS minival, in percent (docs/method.md#published-numbers)."""

    name: str  # of the config that its weights are converted into: the sizes of the backbone tell it
    title: str
    epochs: int
    rare: float
    common: float
    frequent: float
    every: float  # of all classes


PUBLISHED = (
    Published("opendet_swin_t", "Swin-T", 31, 21.0, 24.8, 30.1, 27.0),
    Published("opendet_swin_t", "Swin-T", 50, 21.9, 25.1, 30.4, 27.4),
    Published("opendet_swin_s", "Swin-S", 31, 26.0, 28.6, 32.8, 30.4),
    Published("opendet_swin_l", "Swin-L", 31, 31.2, 32.1, 34.3, 33.1),
)
HEADER = """\
| weights | epochs | fixed AP | fixed APr | fixed APc | fixed APf | LVIS AP here | images | machine, date, commit |
|---|---|---|---|---|---|---|---|---|"""


class Plan(NamedTuple):
    """What there is and what there will be, once all that can be known at once has been looked at."""

    published: Published
    annotations: Path
    annotations_sum: str
    model: Path  # folder of the converted checkpoint, and of its results
    has_model: bool
    tokenizer: str
    clip: Path  # folder of the converted text tower
    has_clip: bool
    results: Path


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m experiments.published",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    top.add_argument("--checkpoint", required=True, type=Path, metavar="FILE", help="the authors' training file")
    top.add_argument("--lvis", required=True, type=Path, metavar="DIR", help=f"folder of {ANNOTATIONS}")
    top.add_argument("--coco", required=True, type=Path, metavar="DIR", help="folder in which COCO's val2017/ lies")
    top.add_argument(
        "--clip", default=CLIP, metavar="X", help="a converted CLIP, or one to convert (default: %(default)s)"
    )
    top.add_argument("--tokenizer", default="", metavar="T", help="T5's: a folder or hub name (default: Flan-T5-base)")
    top.add_argument("--epochs", type=int, default=31, help="of the training; the file may not tell (default: 31)")
    top.add_argument("--out", type=Path, default=Path("runs/published"), metavar="DIR", help="default: %(default)s")
    top.add_argument("--limit", type=at_least(0), default=0, metavar="N", help="the first N images, for a first look")
    return top


def main(arguments: Sequence[str] | None = None) -> None:
    options, fields = parser().parse_known_args(arguments)
    logging.set_verbosity(logging.WARNING)
    enable_cache()
    try:
        check_fields(fields)
        fields = sorted(fields)
        plan = look(options, fields)
        convert(plan, options)
        evaluate(plan, options, fields)
        report(plan, options.limit)
    except (InputError, OSError) as error:  # a disk that is full, too
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on after what is complete")


def check_fields(fields: Sequence[str]) -> None:
    """Raises InputError for what is no field of the config, or none that may differ from the paper's evaluation."""
    names: set[str] = set()
    for field in fields:
        name, equals, _ = field.removeprefix("--config.").partition("=")
        if not field.startswith("--config.") or not equals:
            raise InputError(f"{field}: is no argument; a field of the config is set by --config.FIELD=VALUE")
        if name.startswith(OURS):
            raise InputError(f"{field}: this command sets the field itself")
        if not name.startswith(("data.", "eval.", "model.")):
            raise InputError(f"{field}: has no part in an evaluation")
        if in_evaluation(name):
            raise InputError(f"{field}: the checkpoint alone decides it")
        if name in names:
            raise InputError(f"{field}: the field is given twice")
        names.add(name)
    config_from_arguments(["--config=swin_t", *fields])  # any config with all fields


def look(options: argparse.Namespace, fields: Sequence[str]) -> Plan:
    """Everything that can be wrong, before anything is converted. Raises InputError."""
    annotations = options.lvis / ANNOTATIONS
    for flag, what, path, is_there in (
        ("checkpoint", "file", options.checkpoint, options.checkpoint.is_file()),
        ("lvis", "file", annotations, annotations.is_file()),
        ("coco", "folder", options.coco, options.coco.is_dir()),
    ):
        if not is_there:
            raise InputError(f"--{flag}: there is no {what} {path}")
    model, source = options.out / "model", str(options.checkpoint)
    has_model = is_converted(model, source)
    config = parse_config(as_written(read_config(model, "opendet"))) if has_model else sizes_of(source)
    published = row_of(config, options.epochs, source)
    if not options.limit:
        with_row(read_page(), row(published))
    tokenizer = find_tokenizer(options.tokenizer, config, model if has_model else None)
    clip, has_clip = find_clip(options.clip, options.out)
    name = f"minival_first_{options.limit}" if options.limit else "minival"
    [annotations_sum] = checksum([annotations]).values()
    plan = Plan(
        *(published, annotations, annotations_sum, model, has_model, tokenizer, clip, has_clip),
        results=model / "eval" / name,
    )
    if not (has_model and has_clip and is_evaluated(plan.results, asked(plan, options, fields))):
        check_pictures(annotations, options.coco, options.limit)
    return plan


def is_converted(folder: Path, source: str) -> bool:
    """Whether the folder has the weights of the source. Raises InputError where it has others, or cannot be written."""
    if not (folder / NOTE).is_file():
        check_free(folder)
        return False
    note, path = read_note(folder), Path(source)
    sums = note.get("files", {})
    if path.is_file():
        is_same = list(checksum([path]).values()) == list(sums.values())
    elif path.is_dir():
        files = [path / name for name in sums]
        is_same = all(file.is_file() for file in files) and checksum(files) == sums
    else:
        is_same = note.get("source") == source
    if not is_same:
        raise InputError(f"{folder}: was converted from {note.get('source')}, not from {source}; give another --out")
    return True


def sizes_of(source: str) -> Config:
    """Of the authors' file, by the names in it and their shapes."""
    state = without_wrapper(read_source(source).state, ANCHORS["opendet"], source).state
    try:
        return opendet_config({name: tuple(value.shape) for name, value in state.items()})
    except WeightsError as error:
        raise WeightsError(f"{source}: {error}") from error


def row_of(config: Config, epochs: int, source: str) -> Published:
    rows = [published for published in PUBLISHED if published.name == config.name]
    if not rows:
        titles = ", ".join(dict.fromkeys(published.title for published in PUBLISHED))
        raise InputError(f"{source}: has a backbone of other sizes than those that the paper evaluates: {titles}")
    for published in rows:
        if published.epochs == epochs:
            return published
    known = " or ".join(str(published.epochs) for published in rows)
    raise InputError(f"--epochs {epochs}: of {rows[0].title} the paper has the AP after {known} epochs")


def find_tokenizer(given: str, config: Config, converted: Path | None) -> str:
    """The name of T5's tokenizer, which is one of this model. `converted`: the folder whose config names it already."""
    known = config.data.tokenizer
    name = str(Path(given).resolve()) if given and Path(given).is_dir() else given or known
    if converted and name != known:
        raise InputError(f"--tokenizer {given}: {converted} was converted with {known}; give another --out")
    try:
        load_tokenizer(name, config.model.t5.vocab_size)
    except TokenizerError as error:
        raise InputError(f"--tokenizer {name}: {' '.join(str(error).split())}") from error
    return name


def find_clip(given: str, out: Path) -> tuple[Path, bool]:
    """The folder of the text tower, and whether it is there already; its tokenizer can be had."""
    folder = Path(given)
    has_clip = (folder / NOTE).is_file()
    if not has_clip:
        folder = out / "clip"
        has_clip = is_converted(folder, given)
    if has_clip and (kind := read_note(folder)["kind"]) != "clip":
        raise InputError(f"--clip: {folder} holds weights of kind {kind!r}, not 'clip'")
    try:
        open_tokenizer(str(folder / TOKENIZER) if has_clip else tokenizer_beside(given))
    except WeightsError as error:
        raise InputError(f"--clip {given}: {error}") from error
    return folder, has_clip


def tokenizer_beside(source: str) -> str:
    """A folder or hub name."""
    return str(Path(source).parent) if Path(source).is_file() else source


def check_pictures(annotations: Path, coco: Path, limit: int) -> None:
    """Raises InputError where minival has no image, or any of its pictures is missing."""
    print(f"looking for the pictures of {annotations}", flush=True)
    dataset = read_annotations(annotations, coco, minival=True)[0].first(limit)
    if not len(dataset):
        raise InputError(f"{annotations}: by its coco_urls no image is of COCO's val2017")
    try:
        check_present(dataset, "data.eval", 0.0)
    except ImageError as error:
        raise InputError(f"--coco: {str(error).removeprefix('config.data.eval.images: ')}") from error
    if not limit and len(dataset) != MINIVAL:
        logging.warning("%s: minival has %d images, not %d", annotations, len(dataset), MINIVAL)


def asked(plan: Plan, options: argparse.Namespace, fields: Sequence[str]) -> dict[str, Any]:
    """What results depend on. Both conversions are there."""
    return {
        "checkpoint": list(read_note(plan.model)["files"].values()),
        "text encoder": list(read_note(plan.clip).get("files", {}).values()),
        "annotations": plan.annotations_sum,
        "images": options.limit or "all",
        "fields": list(fields),
    }


def is_evaluated(results: Path, wanted: Mapping[str, Any]) -> bool:
    """Whether the results are there. Raises InputError where they are of something else."""
    if not (results / METRICS).is_file():
        return False
    there = read_object(results / RECORD).get("asked", {}) if (results / RECORD).is_file() else {}
    others = [key for key in wanted if there.get(key) != wanted[key]]
    if others:
        raise InputError(f"{results}: holds results of other {', '.join(others)}; give another --out")
    return True


def read_object(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: is damaged: {error}") from error


def convert(plan: Plan, options: argparse.Namespace) -> None:
    if not plan.has_model:
        convert_command("opendet", str(options.checkpoint), plan.model, plan.tokenizer, "")
        give_back_memory()
    if not plan.has_clip:  # last: this may be a download of gigabytes
        convert_command("clip", options.clip, plan.clip, tokenizer_beside(options.clip), "")


def evaluate(plan: Plan, options: argparse.Namespace, fields: Sequence[str]) -> None:
    wanted = asked(plan, options, fields)
    if is_evaluated(plan.results, wanted):
        print(f"evaluated already: {plan.results / METRICS}", flush=True)
        return
    config = settings(plan, options, fields)
    assert results_folder(config, plan.model) == plan.results
    record = {"asked": wanted, "machine": device(), "date": str(date.today()), "commit": commit()}
    write_json(plan.results / RECORD, record)
    program.run("eval", config, plan.model)


def settings(plan: Plan, options: argparse.Namespace, fields: Sequence[str]) -> Config:
    """The checkpoint's config for the paper's evaluation, with the fields that were given."""
    config = config_from_arguments([f"--config={CONFIGS}/trained.py:{plan.model}", *fields])
    minival = DatasetPaths(str(plan.annotations), str(options.coco), minival=True)
    data = replace(config.data, name=plan.results.name, source="json", eval=minival)
    chosen = replace(
        config.eval, name_mapping="text_encoder", text_encoder=str(plan.clip), limit=options.limit, checkpoint=-1
    )
    config = replace(config, data=data, eval=chosen)
    validate(config)
    return config


def device() -> str:
    devices = jax.local_devices()
    own = "" if devices[0].platform == "cpu" else f"{len(devices)} × {devices[0].device_kind} with "
    return own + machine()


def commit() -> str:
    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    try:
        known = git("rev-parse", "--short", "HEAD")
        changes = " with changes" if git("status", "--porcelain", "--", "opendet_jax", "configs") else ""
    except OSError:  # there is no git
        known = changes = ""
    return f"{known}{changes}" if known else "unknown"  # where only the files were copied


def report(plan: Plan, limit: int) -> None:
    """Prints the row, writes it into the page where it is of all images, and says what lies where."""
    line = row(plan.published, read_object(plan.results / METRICS), read_object(plan.results / RECORD))
    print(f"\n{HEADER}\n{line}\n")
    said = f"the row is of the first {limit} images, and not written into {PAGE}"
    if not limit:
        page = with_row(read_page(), line)
        with replacing(PAGE) as part:
            part.write_text(page, encoding="utf-8")
        said = f"the row is in {PAGE}"
    files = ", ".join(sorted(path.name for path in plan.results.iterdir() if path.is_file()))
    print(f"In {plan.clip}: the text tower; in {plan.model}: the converted weights; in {plan.results}: {files}; {said}")


def start_of_row(published: Published) -> str:
    return f"| {published.title} | {published.epochs} | "


def row(published: Published, metrics: Mapping[str, Any] | None = None, record: Mapping[str, Any] | None = None) -> str:
    """With what was evaluated here, or, where nothing was, with empty cells."""

    def here(key: str) -> str:
        value = metrics.get(key) if metrics else None
        return "–" if value is None else f"{100 * value:.1f}"

    cells = [f"published {published.every} · here {here('fixed_AP')}"]
    groups = (("r", published.rare), ("c", published.common), ("f", published.frequent))
    cells += [f"{value} · {here(f'fixed_AP{group}')}" for group, value in groups]
    cells.append(here("AP"))
    if metrics and record:
        count, images = metrics["images"], record["asked"]["images"]
        part = "the first " if images != "all" else ""
        of_all = "" if count == MINIVAL else f" of {MINIVAL:,}"
        cells.append(f"{part}{count:,}{of_all}")
        given = [field.removeprefix("--config.").replace("|", r"\|") for field in record["asked"]["fields"]]
        cells.append("; ".join([f"{record['machine']}, {record['date']}, commit {record['commit']}", *given]))
    else:
        cells += ["–", "–"]
    return f"{start_of_row(published)}{' | '.join(cells)} |"


def read_page() -> str:
    try:
        return PAGE.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{PAGE}: cannot be read, start the command where it lies: {error.strerror}") from error


def with_row(page: str, line: str) -> str:
    """The page with the line in the place of the row of the same weights and epochs. Raises InputError without one."""
    before, begun, rest = page.partition(BEGIN)
    table, ended, after = rest.partition(END)
    start = " | ".join(line.split(" | ")[:2]) + " | "
    lines = table.splitlines(keepends=True)
    places = [place for place, old in enumerate(lines) if old.startswith(start)]
    if not (begun and ended) or len(places) != 1:
        raise InputError(f"{PAGE}: has no row {start.strip()} between {BEGIN.strip()} and {END.strip()}")
    lines[places[0]] = f"{line}\n"
    return f"{before}{begun}{''.join(lines)}{ended}{after}"


if __name__ == "__main__":
    program.take_large_pages()
    main()
