"""The plan of an epoch: which images, how often, in which company."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from opendet_jax.config import DataConfig
from opendet_jax.data.formats.records import Dataset, Record
from opendet_jax.data.plan import Mixture, plan_epoch, steps_per_epoch

CONFIG = DataConfig(
    batch_size=3,
    buckets=((64, 96), (96, 64)),
    train_short_sides=(40, 48, 56),
    max_long_side=96,
    crop_probability=0.0,
)


def dataset(name: str, wide: int, tall: int = 0) -> Dataset:
    """So many wide and tall pictures, whose files nobody opens, each with an object."""
    records = tuple(
        Record(
            i,
            Path(f"{name}{i}.png"),
            width,
            height,
            np.array([[5, 5, 30, 30]], np.float32),
            (("cat",),),
            np.ones(1, int),
        )
        for i, (width, height) in enumerate([(80, 60)] * wide + [(50, 90)] * tall)
    )
    return Dataset(Path(f"{name}.json"), records, ())


def slots(plan):
    return [slot for planned in plan for slot in planned.slots]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 7, 10, 16, 25])
def test_every_epoch_has_the_same_number_of_batches(batch_size):
    mixture = Mixture.of((dataset("a", 7, 3), 1.0))
    config = replace(CONFIG, batch_size=batch_size, crop_probability=0.5, crop_range=(30, 50))
    for epoch in range(4):
        plan = plan_epoch(mixture, config, seed=0, epoch=epoch)
        assert len(plan) == steps_per_epoch(10, batch_size)
        assert all(len(planned.slots) == batch_size for planned in plan)
        shown = slots(plan)
        assert len({slot.position for slot in shown}) == len(shown)
        if batch_size <= 10:
            assert len({slot.record for slot in shown}) == len(shown)


def test_wide_and_tall_pictures_are_apart():
    """Without crops a group's pictures keep their shape, and only left-over ones share a batch."""
    mixture = Mixture.of((dataset("a", 7, 3), 1.0))
    plan = plan_epoch(mixture, CONFIG, seed=0, epoch=0)
    shapes = [{mixture.records[slot.record].width > 60 for slot in planned.slots} for planned in plan]
    assert sorted(map(len, shapes)) == [1, 1, 1]


def test_left_over_pictures_share_the_largest_of_their_buckets():
    config = replace(CONFIG, batch_size=10, buckets=((40, 96), (64, 96), (96, 64), (96, 96)))
    [planned] = plan_epoch(Mixture.of((dataset("a", 7, 3), 1.0)), config, seed=0, epoch=0)
    assert config.buckets[planned.bucket] in ((64, 96), (96, 64))


@pytest.mark.parametrize(("weight", "shows"), [(1.0, 12), (3.0, 36), (0.5, 6), (1.5, 18), (0.01, 1)])
def test_an_epoch_shows_each_image_as_often_as_its_weight_says(weight, shows):
    mixture = Mixture.of((dataset("a", 9), 1.0), (dataset("b", 12), weight))
    config = replace(CONFIG, batch_size=1)
    epochs = [plan_epoch(mixture, config, seed=0, epoch=epoch) for epoch in range(3)]
    chosen = []
    for plan in epochs:
        assert len(plan) == mixture.shows == 9 + shows
        times = Counter(slot.record for slot in slots(plan))
        assert [times[i] for i in range(9)] == [1] * 9
        assert sum(times[i] for i in range(9, 21)) == shows
        assert {times[i] for i in range(9, 21)} <= {int(weight), int(weight) + 1}
        chosen.append(frozenset(i for i in range(9, 21) if times[i] > int(weight)))
    if weight % 1:
        assert len(set(chosen)) > 1, "another part of the images in each epoch"


def test_data_sets_are_mixed_within_batches():
    mixture = Mixture.of((dataset("a", 30), 1.0), (dataset("b", 30), 1.0))
    plan = plan_epoch(mixture, replace(CONFIG, batch_size=6), seed=0, epoch=0)
    assert sum(len({slot.record < 30 for slot in planned.slots}) == 2 for planned in plan) >= 8


def test_a_mixture_says_what_an_epoch_holds():
    assert Mixture.of((dataset("a", 9), 1.0)).describe() == "9 training images"
    assert Mixture.of((dataset("a", 9), 1.0), (dataset("b", 12), 0.25)).describe().splitlines() == [
        "12 training images an epoch:",
        "   75.0% a.json: 9 images × 1",
        "   25.0% b.json: 12 images × 0.25",
    ]
