"""When unreadable images end training."""

from pathlib import Path

import pytest

from opendet_jax.data.examples import Unreadable
from opendet_jax.data.images import ImageError

ERROR = ImageError("damaged")


def ends_at(limit: float, total: int, bad: set[int]) -> int | None:
    """The first image, seen one after the other, that ends training."""
    unreadable = Unreadable(limit, total)
    for i in range(total):
        try:
            unreadable.saw(i, Path(f"{i}.jpg"), ERROR if i in bad else None)
        except ImageError:
            return i
    return None


@pytest.mark.parametrize(
    ("limit", "total", "bad", "end"),
    [
        (0.01, 5000, set(range(10)), None),  # 10 of the first 1000: not more than 1 %
        (0.01, 5000, set(range(11)), 10),
        (0.01, 5000, set(range(0, 5000, 110)), None),  # less than 1 % throughout
        (0.01, 5000, set(range(0, 5000, 90)), 900),  # the eleventh
        (0.01, 20, {3}, None),  # one alone
        (0.01, 20, {3, 9}, 9),
        (0.25, 8, {0, 1}, None),
        (0.25, 8, {0, 1, 7}, 7),
        (0.0, 20, {5}, 5),
        (1.0, 4, {0, 1, 2}, None),
        (1.0, 4, {0, 1, 2, 3}, 3),
    ],
)
def test_where_training_ends(limit, total, bad, end):
    assert ends_at(limit, total, bad) == end


def test_an_image_counts_once():
    unreadable = Unreadable(0.5, 10)
    for _ in range(20):
        unreadable.saw(0, Path("0.jpg"), ERROR)
        unreadable.saw(1, Path("1.jpg"))


def test_the_error_says_how_many_and_which():
    unreadable = Unreadable(0.01, 900)

    def see_all():
        for i in range(900):
            unreadable.saw(i, Path(f"{i}.jpg"), None if i % 50 else ERROR)

    with pytest.raises(ImageError) as error:
        see_all()
    assert str(error.value) == (
        "10 of the 451 training images seen so far (900 in all) cannot be read, data.max_unreadable is 0.01: "
        "0.jpg, 50.jpg, 100.jpg, 150.jpg, 200.jpg, …"
    )
