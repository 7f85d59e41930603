"""Numbers and the picture that come with a prepared data set."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from opendet_jax.data import summary
from opendet_jax.data.records import Category, Dataset, Record

NAMES = ("$5 bill $", "木", "a_{b", "x" * 300, "dog")


def data_set(*counts):
    records = []
    for i, count in enumerate(counts):
        boxes = np.array([(0, 0, 3 * (n + 1), 3 * (n + 1)) for n in range(count)], np.float32).reshape(-1, 4)
        names = tuple((NAMES[n % len(NAMES)], "thing") for n in range(count))
        records.append(Record(i, Path(f"{i}.jpg"), 90, 90, boxes, names, np.ones(count, np.int64)))
    return Dataset(Path("a.json"), tuple(records), (Category(1, "thing"),))


def test_numbers():
    found = summary.count(data_set(5, 0, 2))
    assert found == {
        "images": 3,
        "images_without_boxes": 1,
        "boxes": 7,
        "most_boxes_of_an_image": 5,
        "names": 6,
        "names_of_one_box": 3,
        "categories": 1,
        "box_side_percentiles": {"1": 3.0, "25": 4.5, "50": 6.0, "75": 10.5, "99": 14.82},
        "most_frequent_names": [["thing", 7], ["$5 bill $", 2], ["木", 2], ["a_{b", 1], ["dog", 1], ["x" * 300, 1]],
    }


@pytest.mark.parametrize("counts", [(), (0,), (1,), (5, 0, 2), (400,)])
def test_a_page_of_histograms_of_anything(tmp_path, counts):
    summary.draw(data_set(*counts), "a $ title", tmp_path / "page.png")
    with Image.open(tmp_path / "page.png") as page:
        assert page.size == (1320, 990)
    assert summary.count(data_set(*counts))["boxes"] == sum(counts)


def test_lines_to_print():
    values = {
        **summary.count(data_set(5, 0)),
        "shards": 2,
        "bytes": 3 * 2**20,
        "problems": {"crowd region": {"count": 1200, "examples": ["a", "b"]}},
        "left_out": [{"image_id": 1, "reason": "gone.jpg: no such image"}],
    }
    assert summary.describe(values).splitlines() == [
        "2 images (1 without boxes), 5 boxes (at most 5 an image), 6 names, 2 shards, 3.0 MiB",
        "  1,200 × crowd region: a; b",
        "  1 × image left out: gone.jpg: no such image",
    ]
