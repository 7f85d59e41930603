"""The mapping of docs/method.md#13-evaluation by hand: texts, clamping, fifteen best, scores, ties, repeated names."""

import numpy as np
import pytest

from opendet_jax.evaluate.name_mapping import (
    UNMAPPED,
    ExactMapping,
    TextEncoderMapping,
    class_text,
    generated_text,
    most_similar_classes,
    normalise_name,
)

CATEGORIES = [
    {"id": 5, "name": "handbag", "synonyms": ["handbag", "purse", "bag"]},
    {"id": 2, "name": "bag", "synonyms": ["bag", "sack"]},
    {"id": 9, "name": "bus_(vehicle)", "synonyms": ["bus_(vehicle)", "sack"]},
    {"id": 4, "name": "Red Square"},
]


def test_normalise():
    assert normalise_name("  Bus_(vehicle)\n") == "bus (vehicle)"
    assert normalise_name("") == ""


def test_exact_mapping_of_a_name():
    class_of = ExactMapping(CATEGORIES).class_of
    assert class_of("Purse ") == 5
    assert class_of("bag") == 2  # its own name before another's synonym
    assert class_of("sack") == 2  # the smaller id of two
    assert class_of("bus (vehicle)") == 9
    assert class_of("red square") == 4
    assert class_of("bus") == UNMAPPED
    assert class_of("") == UNMAPPED


def test_exact_mapping_reads_the_best_beam_and_keeps_the_score():
    scores = np.array([0.75, 0.5, 0.0], np.float32)
    classes = ExactMapping(CATEGORIES)([["purse", "sack"], ["thing", "bag"], ["", "bag"]], scores)
    np.testing.assert_array_equal(classes.ids, [[5], [UNMAPPED], [UNMAPPED]])
    np.testing.assert_array_equal(classes.scores, scores[:, None])
    nothing = ExactMapping(CATEGORIES)([], scores[:0])
    assert nothing.ids.shape == nothing.scores.shape == (0, 1)


class Dictionary:
    """Encodes the texts it was given vectors for, and notes what it was asked."""

    def __init__(self, **vectors):
        self.rows = {f"a {name.replace('_', ' ')}": row for name, row in vectors.items()}
        self.asked = []

    def __call__(self, texts):
        self.asked.append(list(texts))
        return np.array([self.rows[text] for text in texts], np.float32).reshape(-1, 2)


def p(*scores):
    return np.array(scores, np.float32)


@pytest.mark.parametrize(
    ("beams", "text"),
    [
        (["cat"], "a cat"),
        (["cat", "black cat", "kitten"], "a cat, black cat, kitten"),
        (["Cat ", "cat", "cat"], "a Cat , cat, cat"),  # as generated
        ([""], "a "),
        (["", "", ""], "a , , "),
        (["x" * 75], "a " + "x" * 75),
        (["x" * 76], "a " + "x" * 75),
        (["x" * 40, "y" * 40, "z"], "a " + "x" * 40 + ", " + "y" * 33),  # 75 in all: the join comes first
        (["x" * 74, "y", "z"], "a " + "x" * 74 + ","),
        (["é" * 80], "a " + "é" * 75),  # characters, not bytes
    ],
)
def test_what_is_embedded_of_a_box(beams, text):
    assert generated_text(beams) == text


def test_what_is_embedded_of_a_class():
    assert class_text("bus_(vehicle)") == class_text("bus (vehicle)") == "a bus (vehicle)"
    assert class_text("x" * 100) == "a " + "x" * 100


def test_by_hand():
    """cos = 0.96, 0.8, 0.6, −0.8 → 0; score = sqrt(p·cos)."""
    classes = np.array([[1, 0], [0, 1], [-1, 0], [0.6, 0.8]], np.float32)
    places, scores = most_similar_classes([["thing"]], p(0.25), classes, Dictionary(thing=(0.8, 0.6)))
    np.testing.assert_array_equal(places, [[3, 0, 1, 2]])
    np.testing.assert_allclose(scores, [[0.24**0.5, 0.2**0.5, 0.15**0.5, 0]], rtol=1e-6)
    assert scores.dtype == np.float32


def test_fifteen_are_kept_and_the_first_of_equals_goes_first():
    classes = np.array([[1, 0]] * 17 + [[0, 1]] * 3, np.float32)
    encode = Dictionary(right=(1, 0), up=(0, 1), left=(-1, 0))
    places, scores = most_similar_classes([["right"], ["up"], ["left"]], p(1, 0.25, 1), classes, encode)
    np.testing.assert_array_equal(places[0], range(15))
    np.testing.assert_array_equal(scores[0], [1.0] * 15)
    np.testing.assert_array_equal(places[1], [17, 18, 19, *range(12)])
    np.testing.assert_array_equal(scores[1], [0.5] * 3 + [0.0] * 12)
    np.testing.assert_array_equal(places[2], range(15))  # −1 and 0 are both 0 when clamped
    np.testing.assert_array_equal(scores[2], [0.0] * 15)


def test_similarity_is_at_most_one():
    """Unit rows may multiply to a little more."""
    slightly = np.float32(1.0000001)
    assert slightly > 1
    _, scores = most_similar_classes([["thing"]], p(1), np.array([[slightly, 0]], np.float32), Dictionary(thing=(1, 0)))
    assert scores == 1


def test_a_score_of_zero_stays_zero():
    classes = np.array([[1, 0], [0, 1]], np.float32)
    places, scores = most_similar_classes([["thing"]], p(0), classes, Dictionary(thing=(0.6, 0.8)))
    np.testing.assert_array_equal(places, [[1, 0]])
    np.testing.assert_array_equal(scores, [[0, 0]])


def test_a_repeated_name_is_encoded_once():
    encode = Dictionary(cat=(1, 0), dog=(0, 1))
    classes = np.array([[1, 0], [0, 1]], np.float32)
    places, scores = most_similar_classes([["cat"], ["dog"], ["cat"], ["cat"]], p(1, 1, 0.25, 0), classes, encode)
    assert encode.asked == [["a cat", "a dog"]]
    np.testing.assert_array_equal(places, [[0, 1], [1, 0], [0, 1], [0, 1]])
    np.testing.assert_array_equal(scores, [[1, 0], [1, 0], [0.5, 0], [0, 0]])


def test_no_box():
    places, scores = most_similar_classes([], p(), np.eye(2, dtype=np.float32), Dictionary())
    assert places.shape == scores.shape == (0, 2)


def test_the_mapping_gives_ids_the_smaller_first():
    categories = [{"id": 9, "name": "bus_(vehicle)"}, {"id": 4, "name": "cat"}, {"id": 7, "name": "kitten"}]
    encode = Dictionary(**{"bus (vehicle)": (0, 1)}, cat=(1, 0), kitten=(1, 0))
    mapping = TextEncoderMapping(categories, encode)
    classes = mapping([["cat"], ["bus (vehicle)"]], p(1, 0.64))
    assert mapping.title == "text_encoder"
    np.testing.assert_array_equal(classes.ids, [[4, 7, 9], [9, 4, 7]])
    np.testing.assert_allclose(classes.scores, [[1, 1, 0], [0.8, 0, 0]])
    assert encode.asked[0] == ["a cat", "a kitten", "a bus (vehicle)"]  # classes are encoded once, at the start
    assert len(encode.asked) == 2
