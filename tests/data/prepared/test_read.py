"""A prepared folder in the place of the files it was made from: training, evaluation, many threads."""

import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from opendet_jax.config import Config, DataConfig, DatasetPaths
from opendet_jax.config_files import parse_config
from opendet_jax.data.datasets import load_datasets, read_annotations
from opendet_jax.data.examples import Examples
from opendet_jax.data.images import encoded
from opendet_jax.data.pipeline import evaluation_batches
from opendet_jax.data.plan import Mixture
from opendet_jax.data.prepared.write import Job, prepare
from opendet_jax.evaluate.truth import lvis_truth
from tests.data import published

DATA = DataConfig(
    batch_size=3,
    max_objects=4,
    buckets=((64, 96), (96, 64), (96, 96)),
    train_short_sides=(48, 56, 64),
    eval_short_side=64,
    max_long_side=96,
    crop_short_sides=(50, 70),
    crop_range=(20, 60),
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Visual Genome as downloaded, and prepared."""
    folder = tmp_path_factory.mktemp("vg")
    annotations = published.visual_genome(folder, images=20)
    prepare(Job("visual_genome", annotations, folder, folder / "prepared", images_per_shard=7), progress=False)
    return folder, folder / "prepared"


def data_set(*paths):
    return read_annotations(*paths)[0]


def test_training_sees_the_same_batches(folders):
    original, prepared = folders
    streams = [
        Examples(Mixture.of((dataset, 1.0)), DATA, seed=3)
        for dataset in (data_set(original / "objects.json", original), data_set(prepared, ""))
    ]
    for step in (0, 1, 5, 6, 100):
        ours, theirs = (stream[step] for stream in streams)
        np.testing.assert_array_equal(ours.pixels, theirs.pixels)
        np.testing.assert_array_equal(ours.mask, theirs.mask)
        np.testing.assert_array_equal(ours.boxes, theirs.boxes)
        np.testing.assert_array_equal(ours.image_ids, theirs.image_ids)
        assert ours.names == theirs.names


def test_evaluation_sees_the_same_batches_and_truth(folders):
    original, prepared = folders
    files, shards = data_set(original / "objects.json", original), data_set(prepared, "")
    for ours, theirs in zip(*(evaluation_batches(d, DATA, 3) for d in (files, shards)), strict=True):
        np.testing.assert_array_equal(ours.images.pixels, theirs.images.pixels)
        np.testing.assert_array_equal(ours.image_ids, theirs.image_ids)
    assert lvis_truth(shards) == lvis_truth(files)
    assert len(lvis_truth(files)["annotations"]) == 100


@pytest.mark.parametrize("make", [published.lvis, published.coco])
def test_the_truth_of_other_forms(tmp_path, make):
    annotations = make(tmp_path)
    prepare(Job("coco_json", annotations, tmp_path, tmp_path / "prepared"), progress=False)
    truth = lvis_truth(data_set(tmp_path / "prepared", ""))
    assert truth == lvis_truth(data_set(annotations, tmp_path))
    assert truth["annotations"]


def test_a_config_names_the_folder(folders, tmp_path):
    original, prepared = folders
    config = Config().to_config_dict()
    config.data.train.annotations = str(prepared)
    config.data.eval.update(annotations=str(original / "objects.json"), images=str(original))
    train, evaluation = load_datasets(parse_config(config), tmp_path)
    assert len(train.records) == len(evaluation) == 20
    assert DatasetPaths() == DatasetPaths(annotations="", images="", minival=False)


def test_pictures_are_read_at_random_by_many_threads(folders):
    original, prepared = folders
    expected = [encoded(record) for record in data_set(original / "objects.json", original).records]
    records = data_set(prepared, "").records
    order = np.random.default_rng(0).integers(len(records), size=400).tolist()
    with ThreadPoolExecutor(8) as pool:
        for number, content in zip(order, pool.map(lambda n: encoded(records[n]), order), strict=True):
            assert content == expected[number]


def test_records_travel_to_other_processes(folders):
    record = pickle.loads(pickle.dumps(data_set(folders[1], "").records[3]))
    assert encoded(record) == encoded(data_set(folders[1], "").records[3])
