"""The rules cover every name of the authors' checkpoints, and agree on what is one tensor and what is dead."""

import numpy as np

from opendet_jax.weights.opendet import OPENDET_RULES
from opendet_jax.weights.rules import target


def rows(path):
    """The tab-separated columns of each line."""
    lines = path.read_text().splitlines()
    return [line.split("\t") for line in lines if line.strip() and not line.startswith("#")]


def test_every_name_of_a_full_checkpoint_has_a_rule(vectors_folder):
    names = [row[0] for row in rows(vectors_folder / "official_state_dict.txt")]
    assert len(names) == 1868 + 446
    for name in names:
        target(name, OPENDET_RULES)


def test_tensors_are_dead_exactly_where_the_authors_never_use_them(vectors_folder):
    uses = {row[0]: row[3] for row in rows(vectors_folder / "state_dict.txt") if len(row) == 4}
    assert {use for use in uses.values()} == {"used", "unused", "buffer"}
    for name, use in uses.items():
        path, _ = target(name, OPENDET_RULES)
        assert (path is not None) == (use == "used"), name


def test_no_two_tensors_share_a_path_and_aliases_agree(vectors_folder):
    table = rows(vectors_folder / "state_dict.txt")
    paths = {row[0]: target(row[0], OPENDET_RULES)[0] for row in table if len(row) == 4}
    used = [path for path in paths.values() if path is not None]
    assert len(used) == len(set(used))
    for alias, name in (row for row in table if len(row) == 2):
        path, _ = target(alias, OPENDET_RULES)
        assert path in (paths[name], None), alias


def test_transposition():
    path, transform = target("detr.detr.transformer.encoder.layers.3.linear2.weight", OPENDET_RULES)
    assert path == "encoder/layers_3/ffn/linear2/kernel"
    assert transform(np.zeros((256, 2048))).shape == (2048, 256)
    path, transform = target("detr.detr.input_proj.3.0.weight", OPENDET_RULES)
    assert path == "neck/projections_3/kernel"
    assert transform(np.zeros((256, 768, 3, 3))).shape == (3, 3, 768, 256)
