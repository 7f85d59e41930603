"""The training and the evaluation set that a config asks for, read into memory from annotations in any form."""

import hashlib
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from absl import logging

from opendet_jax.config import Config, ConfigError, DatasetPaths, split_of
from opendet_jax.data.formats.json_source import read_json
from opendet_jax.data.formats.json_stream import AnnotationError, is_list
from opendet_jax.data.formats.label_folders import label_form, read_labels
from opendet_jax.data.formats.records import Dataset, Problems, Record
from opendet_jax.data.formats.visual_genome import read_visual_genome
from opendet_jax.data.plan import Mixture
from opendet_jax.data.prepared.read import read_prepared
from opendet_jax.data.scenes import generate

SCENES_SEED = 0
FEW = 50  # held-out images are listed, where they are fewer; names of a message
ROBOFLOW = re.compile(r"(.+)\.rf\.[0-9A-Za-z]+\.\w+")  # of a version of a photograph: its name, a hash
COMPARED = 50_000  # images whose files are looked at; more would take too long at every start
MOST_COPIES = 50  # a name that more files have is one that many photographs were given
END = 4096  # bytes that files of different pictures differ in


def load_datasets(config: Config, workdir: str | Path) -> tuple[Mixture, Dataset]:
    """The training sets, each cut to `data.train_limit`, and the evaluation set, cut to `eval.limit`.

    Scenes are drawn on first use into `data.scenes_dir`, or the workdir. Annotations passed over are reported in one
    warning a file. Where `data.eval` names no json, part of `data.train` is held out (`hold_out`).

    Raises:
        ConfigError: annotations are needed and not named.
        AnnotationError: annotations cannot be used, or nothing in them can be trained on.
    """
    data = config.data
    train = _training_json(config, workdir).first(data.train_limit)
    if _holds_out(config):
        train, evaluation = hold_out(train, data.held_out, data.held_out_by)
        _announce(train, evaluation, data.held_out)
    else:
        evaluation = _evaluation_json(config, workdir)
    others = []
    for i, paths in enumerate(data.mixture):
        dataset = read(paths, f"data.mixture[{i}]").first(data.train_limit)
        if _holds_out(config) and evaluation is not train:
            dataset = _without(dataset, evaluation, data.held_out_by)
        others.append((dataset, paths))
    mixture = Mixture.of((train, data.train.weight), *((dataset, paths.weight) for dataset, paths in others))
    return mixture, evaluation.first(config.eval.limit)


def load_evaluation(config: Config, workdir: str | Path) -> Dataset:
    """The evaluation set alone, as `load_datasets` gives it."""
    if _holds_out(config):
        train = _training_json(config, workdir).first(config.data.train_limit)
        held = hold_out(train, config.data.held_out, config.data.held_out_by)[1]
        return held.first(config.eval.limit)
    return _evaluation_json(config, workdir).first(config.eval.limit)


def read(paths: DatasetPaths, where: str) -> Dataset:
    """The data set of a section of the config, which `where` names. What its json has that cannot be used is logged."""
    if not paths.annotations:
        raise ConfigError(f"config.{where}.annotations is empty: name a json, a data.yaml or a folder")
    split = "val" if where == "data.eval" else "train"
    dataset, problems = read_annotations(paths.annotations, paths.images, paths.name_field, paths.minival, split)
    if problems.counts:
        logging.warning("%s: %s", dataset.annotations, problems)
    return dataset


def hold_out(
    dataset: Dataset, share: float, by: Literal["photographs", "images"] = "photographs"
) -> tuple[Dataset, Dataset]:
    """The images to train on and those to evaluate on: `share` of them, at least one; all of them where it is 0.

    They are those whose ids have the smallest hashes, so that what is held out hardly changes when images are added.
    By "photographs" all copies of one (`copies`) go where the first goes, and a class of two photographs or more has
    one on each side, if need be beyond the share.
    """
    units = copies(dataset.records) if by == "photographs" and share else [(record,) for record in dataset.records]
    if share == 0 or len(units) < 2:
        return dataset, dataset
    units = sorted(units, key=lambda unit: _hash(unit[0]))
    held = set(range(min(max(1, round(share * len(units))), len(units) - 1)))
    if by == "photographs":
        held = _on_both_sides(held, _units_of_classes(dataset, units))
    ids = {record.image_id for number in held for record in units[number]}
    sides = (
        tuple(record for record in dataset.records if record.image_id not in ids),
        tuple(record for record in dataset.records if record.image_id in ids),
    )
    kept, out = (Dataset(dataset.annotations, records, dataset.categories) for records in sides)
    return kept, out


def _without(dataset: Dataset, held: Dataset, by: Literal["photographs", "images"]) -> Dataset:
    """A part of the mixture without the photographs that are held out of data.train; how many is logged.

    They are told by their files' paths, and by "photographs" as `copies` does.
    """
    paths = {record.path.resolve() for record in held.records}
    kept = tuple(record for record in dataset.records if record.path.resolve() not in paths)
    if by == "photographs":
        there = set(map(id, held.records))
        units = copies([*held.records, *kept])
        shown = {id(record) for unit in units if not there.isdisjoint(map(id, unit)) for record in unit}
        kept = tuple(record for record in kept if id(record) not in shown)
    if len(kept) == len(dataset):
        return dataset
    left = len(dataset) - len(kept)
    logging.warning("%s: %d images left out: they show what is held out for evaluation", dataset.annotations, left)
    if not kept:
        raise AnnotationError(f"{dataset.annotations}: every image is held out for evaluation (data.held_out)")
    return replace(dataset, records=kept)


def _units_of_classes(dataset: Dataset, units: Sequence[Sequence[Record]]) -> list[list[int]]:
    """The numbers of the photographs with each class that has two of them; classes of one name are one."""
    names = {category.id: category.name for category in dataset.categories}
    found: dict[str, list[int]] = defaultdict(list)
    for number, unit in enumerate(units):
        for name in {names[class_] for record in unit for class_ in record.category_ids.tolist()}:
            found[name].append(number)
    return [numbers for _, numbers in sorted(found.items(), key=lambda item: (len(item[1]), item[0])) if numbers[1:]]


def _on_both_sides(held: set[int], classes: Sequence[Sequence[int]]) -> set[int]:
    """`held`, with at least one member of each class and not all of them, where that can be for all together.

    What is added to it is the best for the class: the member with the most classes of which none is held yet.
    """
    of_number: dict[int, list[int]] = defaultdict(list)
    for place, numbers in enumerate(classes):
        for number in numbers:
            of_number[number].append(place)
    held = set(held)
    for numbers in classes:
        if held.issuperset(numbers):  # by chance
            held.remove(numbers[-1])
    trained_on = [sum(number not in held for number in numbers) for numbers in classes]
    missing = {place for place, numbers in enumerate(classes) if held.isdisjoint(numbers)}
    for place, numbers in enumerate(classes):
        spare = [n for n in numbers if place in missing and all(trained_on[other] > 1 for other in of_number[n])]
        if spare:
            best = max(spare, key=lambda n: (len(missing.intersection(of_number[n])), -n))
            held.add(best)
            missing.difference_update(of_number[best])
            for other in of_number[best]:
                trained_on[other] -= 1
    return held


def copies(records: Sequence[Record]) -> list[tuple[Record, ...]]:
    """The records by the photograph that they show, in the order of the first of each.

    Copies are files of equal content, and what Roboflow makes of one: "a_jpg.rf.<hash>.jpg". Content is read only of
    files of one length whose ends agree; of pictures in shards the names alone are compared.
    """
    first = list(range(len(records)))  # number of the first record of the same photograph

    def root(number: int) -> int:
        while first[number] != number:
            first[number] = first[first[number]]
            number = first[number]
        return number

    named: dict[str, list[int]] = defaultdict(list)
    for number, record in enumerate(records):
        if match := ROBOFLOW.fullmatch(record.path.name):
            named[match[1]].append(number)
    alike = [numbers for numbers in named.values() if len(numbers) <= MOST_COPIES]
    if len(records) > COMPARED:
        logging.warning("copies among the %d images are told by their names alone, not by content", len(records))
    equal = _equal_files(records) if len(records) <= COMPARED else []
    for numbers in (*alike, *equal):
        for number in numbers[1:]:
            one, other = sorted((root(numbers[0]), root(number)))
            first[other] = one
    groups: dict[int, list[Record]] = defaultdict(list)
    for number, record in enumerate(records):
        groups[root(number)].append(record)
    return [tuple(group) for group in groups.values()]


def _equal_files(records: Sequence[Record]) -> list[list[int]]:
    """The numbers of records whose files have equal content, each time it occurs more than once."""
    groups = [[number for number, record in enumerate(records) if record.stored is None]]
    for key in (_length, _end, _content):
        split: dict[Any, list[int]] = defaultdict(list)
        for place, group in enumerate(groups):
            for number in group:
                found = key(records[number].path)
                if found is not None:
                    split[place, found].append(number)
        groups = [group for group in split.values() if len(group) > 1]
    return groups


def _length(path: Path) -> int | None:
    try:
        return path.stat().st_size or None
    except (OSError, ValueError):  # missing: check_present says so
        return None


def _end(path: Path) -> bytes | None:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - END))
            return file.read()
    except OSError:
        return None


def _content(path: Path) -> bytes | None:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError:
        return None


def _hash(record: Record) -> bytes:
    return hashlib.sha256(str(record.image_id).encode()).digest()


def _holds_out(config: Config) -> bool:
    return config.data.source == "json" and not config.data.eval.annotations


def with_own_hold_out(config: Config, run: Config) -> Config:
    """`config` with the hold-out of the run that is evaluated: on other images of the same json it was trained."""
    data, own = config.data, run.data
    same = Path(data.train.annotations).name == Path(own.train.annotations).name
    if not (_holds_out(config) and _holds_out(run) and same):
        return config
    if (data.held_out, data.held_out_by) != (own.held_out, own.held_out_by):
        logging.warning(
            "data.held_out = %g and data.held_out_by = %r, as the run was trained, not %g and %r",
            *(own.held_out, own.held_out_by, data.held_out, data.held_out_by),
        )
    return replace(config, data=replace(data, held_out=own.held_out, held_out_by=own.held_out_by))


def _announce(train: Dataset, evaluation: Dataset, share: float) -> None:
    if train is evaluation:
        logging.warning(
            "EVALUATED ON WHAT IT IS TRAINED ON: data.eval names no json and nothing of %s is held out "
            "(data.held_out = %g): the score says nothing about other images",
            *(train.annotations, share),
        )
        return
    names = {category.id: category.name for category in train.categories}

    def classes(records: Sequence[Record]) -> set[str]:
        return {names[number] for record in records for number in record.category_ids.tolist()}

    lines = [
        f"HELD OUT FOR EVALUATION: {len(evaluation)} of the {len(train) + len(evaluation)} images of "
        f"{train.annotations} (data.held_out = {share:g}), as data.eval names no json"
    ]
    if len(evaluation) < FEW:
        for record in evaluation.records:
            lines.append(f"  {record.path}: {', '.join(sorted(classes([record]))) or 'no object'}")
    trained, held = classes(train.records), classes(evaluation.records)
    for what, found in (
        ("held out: they have one, or none that can be spared", trained - held),
        ("left to train on: they have one", held - trained),
    ):
        if found:
            shown = [*map(repr, sorted(found)[:FEW]), *["…"] * (len(found) > FEW)]
            lines.append(f"{len(found)} classes have no image {what}: {', '.join(shown)}")
    logging.warning("%s", "\n".join(lines))


def _training_json(config: Config, workdir: str | Path) -> Dataset:
    if config.data.source == "json":
        return read(config.data.train, "data.train")
    return _scenes(_drawn(config, workdir))


def _evaluation_json(config: Config, workdir: str | Path) -> Dataset:
    data = config.data
    if data.source == "json":
        return read(data.eval, "data.eval")
    train = _drawn(config, workdir)
    return _scenes(
        generate(train.parent.parent, data.scenes_eval, SCENES_SEED, data.scenes_size, "val", frequencies_from=train)
    )


def _drawn(config: Config, workdir: str | Path) -> Path:
    """The json of the training scenes, whose frequency groups the evaluation scenes carry."""
    data = config.data
    return generate(Path(data.scenes_dir or workdir), data.scenes_train, SCENES_SEED, data.scenes_size, "train")


def _scenes(annotations: Path) -> Dataset:
    return read(DatasetPaths(str(annotations), str(annotations.parent / "images")), "data.train")


def read_annotations(
    annotations: str | Path, images: str | Path, name_field: str = "", minival: bool = False, split: str = "train"
) -> tuple[Dataset, Problems]:
    """A data set, and what in it could not be used.

    `annotations` is a json in the form of LVIS or COCO (see `read_json`), Visual Genome's objects.json with its
    image_data.json beside it (`read_visual_genome`), a YOLO or a Pascal VOC folder (`read_labels`), or a folder that
    `python -m opendet_jax.data prepare` has written, which holds its images itself. `name_field` and `minival` are for
    the first form only; `split` is what is read of a YOLO or VOC folder, unless a split is named behind its path.
    Raises AnnotationError.
    """
    path, named = split_of(annotations)
    if form := label_form(path):
        _refuse(path, f"in {form}'s form", name_field, minival)
        return read_labels(annotations, images, split)
    if named:
        raise AnnotationError(f"{path}: has no splits, and so no {named!r}: YOLO and Pascal VOC folders have")
    if path.is_dir():
        _refuse(path, "a prepared folder", name_field, minival)
        return read_prepared(path), Problems()
    if is_list(path):
        _refuse(path, "in Visual Genome's form", name_field, minival)
        return read_visual_genome(path, images)
    return read_json(path, images, name_field, minival)


def _refuse(path: Path, form: str, name_field: str, minival: bool) -> None:
    if name_field:
        raise AnnotationError(f"{path}: is {form}, which has no field {name_field!r} to take names from")
    if minival:
        raise AnnotationError(f"{path}: is {form}: minival is part of LVIS's val, by the coco_url of its images")
