"""The training and the evaluation set that a config asks for, read into memory from annotations in any form."""

import hashlib
from pathlib import Path

from absl import logging

from opendet_jax.config import Config, ConfigError, DatasetPaths
from opendet_jax.data.formats.json_source import read_json
from opendet_jax.data.formats.json_stream import AnnotationError, is_list
from opendet_jax.data.formats.records import Dataset, Problems, Record
from opendet_jax.data.formats.visual_genome import read_visual_genome
from opendet_jax.data.plan import Mixture
from opendet_jax.data.prepared.read import read_prepared
from opendet_jax.data.scenes import generate

SCENES_SEED = 0


def load_datasets(config: Config, workdir: str | Path) -> tuple[Mixture, Dataset]:
    """The training sets, each cut to `data.train_limit`, and the evaluation set, cut to `eval.limit`.

    Scenes are drawn on first use into `data.scenes_dir`, or the workdir. Annotations passed over are reported in one
    warning a file. Where `data.eval` names no json, part of `data.train` is held out (`hold_out`).

    Raises:
        ConfigError: a json is needed and not named.
        AnnotationError: a json cannot be used, or nothing in it can be trained on.
    """
    data = config.data
    train = _training_json(config, workdir).first(data.train_limit)
    if _holds_out(config):
        train, evaluation = hold_out(train, data.held_out)
        _announce(train, evaluation, data.held_out)
    else:
        evaluation = _evaluation_json(config, workdir)
    others = [
        (read(paths, f"data.mixture[{i}]").first(data.train_limit), paths) for i, paths in enumerate(data.mixture)
    ]
    mixture = Mixture.of((train, data.train.weight), *((dataset, paths.weight) for dataset, paths in others))
    return mixture, evaluation.first(config.eval.limit)


def load_evaluation(config: Config, workdir: str | Path) -> Dataset:
    """The evaluation set alone, as `load_datasets` gives it."""
    if _holds_out(config):
        train = _training_json(config, workdir).first(config.data.train_limit)
        return hold_out(train, config.data.held_out)[1].first(config.eval.limit)
    return _evaluation_json(config, workdir).first(config.eval.limit)


def read(paths: DatasetPaths, where: str) -> Dataset:
    """The data set of a section of the config, which `where` names. What its json has that cannot be used is logged."""
    if not paths.annotations:
        raise ConfigError(f"config.{where}.annotations is empty: name a json in LVIS or COCO form")
    dataset, problems = read_annotations(paths.annotations, paths.images, paths.name_field, paths.minival)
    if problems.counts:
        logging.warning("%s: %s", paths.annotations, problems)
    return dataset


def hold_out(dataset: Dataset, share: float) -> tuple[Dataset, Dataset]:
    """The images to train on and those to evaluate on: `share` of them, at least one; all of them where it is 0.

    They are those whose ids have the smallest hashes, so that what is held out hardly changes when images are added.
    """
    if share == 0 or len(dataset) < 2:
        return dataset, dataset
    count = min(max(1, round(share * len(dataset))), len(dataset) - 1)
    held = {record.image_id for record in sorted(dataset.records, key=_hash)[:count]}
    sides = (
        tuple(record for record in dataset.records if record.image_id not in held),
        tuple(record for record in dataset.records if record.image_id in held),
    )
    kept, out = (Dataset(dataset.annotations, records, dataset.categories) for records in sides)
    return kept, out


def _hash(record: Record) -> bytes:
    return hashlib.sha256(str(record.image_id).encode()).digest()


def _holds_out(config: Config) -> bool:
    return config.data.source == "json" and not config.data.eval.annotations


def _announce(train: Dataset, evaluation: Dataset, share: float) -> None:
    if train is evaluation:
        logging.warning(
            "EVALUATED ON WHAT IT IS TRAINED ON: data.eval names no json and nothing of %s is held out "
            "(data.held_out = %g): the score says nothing about other images",
            *(train.annotations, share),
        )
    else:
        logging.warning(
            "HELD OUT FOR EVALUATION: %d of the %d images of %s (data.held_out = %g), as data.eval names no json",
            *(len(evaluation), len(train) + len(evaluation), train.annotations, share),
        )


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
    annotations: str | Path, images: str | Path, name_field: str = "", minival: bool = False
) -> tuple[Dataset, Problems]:
    """A data set, and what in it could not be used.

    `annotations` is a json in the form of LVIS or COCO (see `read_json`), Visual Genome's objects.json with its
    image_data.json beside it (`read_visual_genome`), or a folder that `python -m opendet_jax.data prepare` has written,
    which holds its images itself. `name_field` and `minival` are for the first form only.
    Raises AnnotationError.
    """
    path = Path(annotations)
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
