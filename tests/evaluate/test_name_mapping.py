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


def test_exact_mapping():
    mapping = ExactMapping(CATEGORIES)
    assert mapping("Purse ") == 5
    assert mapping("bag") == 2  # its own name before another's synonym
    assert mapping("sack") == 2  # the smaller id of two
    assert mapping("bus (vehicle)") == 9
    assert mapping("red square") == 4
    assert mapping("bus") == UNMAPPED
    assert mapping("") == UNMAPPED
