import numpy as np

from opendet_jax.evaluate.name_mapping import UNMAPPED, ExactMapping, normalise

CATEGORIES = [
    {"id": 5, "name": "handbag", "synonyms": ["handbag", "purse", "bag"]},
    {"id": 2, "name": "bag", "synonyms": ["bag", "sack"]},
    {"id": 9, "name": "bus_(vehicle)", "synonyms": ["bus_(vehicle)", "sack"]},
    {"id": 4, "name": "Red Square"},
]


def test_normalise():
    assert normalise("  Bus_(vehicle)\n") == "bus (vehicle)"
    assert normalise("") == ""


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
