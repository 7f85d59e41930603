"""Annotations in any form that is understood, recognised by what they hold."""

from pathlib import Path

from opendet_jax.data.json_source import read_json
from opendet_jax.data.json_stream import AnnotationError, is_list
from opendet_jax.data.prepared import read_prepared
from opendet_jax.data.records import Dataset, Problems
from opendet_jax.data.visual_genome import read_visual_genome


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
