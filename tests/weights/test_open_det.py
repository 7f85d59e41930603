"""The authors' checkpoints: every name has its place, nothing is left over, and ours go back under all their names."""

from pathlib import Path

import jax
import jaxtyping
import numpy as np
import pytest

from opendet_jax.errors import WeightsError
from opendet_jax.model.opendet import OpenDet, init_params
from opendet_jax.weights.convert import export, opendet_config
from opendet_jax.weights.open_det import OPENDET_RULES
from opendet_jax.weights.rules import flat, nested, shapes_of


@pytest.fixture(autouse=True)
def abstract():
    """eval_shape passes shapes through our dataclasses, whose fields otherwise insist on arrays."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def rows(path: Path) -> list[list[str]]:
    """The tab-separated columns of each line."""
    lines = path.read_text().splitlines()
    return [line.split("\t") for line in lines if line.strip() and not line.startswith("#")]


def full_size(vectors_folder: Path) -> dict[str, np.ndarray]:
    """Every name and shape of a full checkpoint; arrays that take no memory."""
    state = {}
    for name, shape, dtype, *_ in rows(vectors_folder / "official_state_dict.txt"):
        sides = tuple(int(n) for n in shape.strip("()").split(",") if n.strip())
        state[name] = np.broadcast_to(np.zeros((), dtype), sides)
    return state


def wanted(config) -> dict[str, tuple[int, ...]]:
    model = OpenDet(config.model, config.ablation)
    return shapes_of(jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0)))


def places(state: dict[str, np.ndarray], shapes: dict[str, tuple[int, ...]]) -> set[str]:
    """The paths that the names fill, each with an array of its shape."""
    filled = set()
    for name, value in state.items():
        path, layout, _ = OPENDET_RULES.place(name)
        if path is not None:
            assert layout.ours(value).shape == shapes[path], name
            filled.add(path)
    return filled


def test_a_full_checkpoint_fits_with_nothing_left_over(vectors_folder):
    state = full_size(vectors_folder)
    assert len(state) == 1868 + 446
    config = opendet_config({name: value.shape for name, value in state.items()})
    assert config.name == "opendet_swin_t"
    assert (config.model.t5.vocab_size, config.model.t5.num_layers, config.model.text_width) == (32128, 12, 768)
    assert config.model.t5.activation == "gelu_erf"
    assert config.model.t5.head_bias
    shapes = wanted(config)
    assert places(state, shapes) == set(shapes)
    live = sum(int(np.prod(shape)) for shape in shapes.values())
    assert 328e6 < live < 329e6  # as measured of the authors' program


def test_tensors_are_dead_exactly_where_the_authors_never_use_them(vectors_folder):
    uses = {row[0]: row[3] for row in rows(vectors_folder / "state_dict.txt") if len(row) == 4}
    assert set(uses.values()) == {"used", "unused", "buffer"}
    for name, use in uses.items():
        assert (OPENDET_RULES.place(name).path is not None) == (use == "used"), name


def test_aliases_have_the_path_of_their_tensor(vectors_folder):
    table = rows(vectors_folder / "state_dict.txt")
    paths = {row[0]: OPENDET_RULES.place(row[0]).path for row in table if len(row) == 4}
    used = [path for path in paths.values() if path is not None]
    assert len(used) == len(set(used))
    for alias, name in (row for row in table if len(row) == 2):
        assert OPENDET_RULES.place(alias).path == paths[name], alias


def test_ours_go_back_under_every_name_that_matters(vectors_folder):
    state = full_size(vectors_folder)
    shapes = wanted(opendet_config({name: value.shape for name, value in state.items()}))
    ours = nested({path: np.broadcast_to(np.float32(0), shape) for path, shape in shapes.items()})
    theirs = {
        name: layout.theirs(value).shape
        for path, value in flat(ours).items()
        for name, layout, _ in OPENDET_RULES.names(path)
    }
    alive = {name: value.shape for name, value in state.items() if OPENDET_RULES.place(name).path is not None}
    assert theirs == alive


def test_there_and_back_is_exact():
    """A part of the tree, with aliases, transposed and shared arrays."""
    rng = np.random.default_rng(0)
    shapes = {
        "decoder/box_head_one_to_one/layers_2/kernel": (6, 4),
        "decoder/layers_4/ffn3/linear1/kernel": (6, 8),
        "neck/projections_3/kernel": (3, 3, 5, 6),
        "name_generator/t5/shared/lora_A": (9, 2),
    }
    ours = nested({path: rng.standard_normal(shape, np.float32) for path, shape in shapes.items()})
    theirs = export(ours, "opendet")
    assert theirs["detr.detr.input_proj.3.0.weight"].shape == (6, 5, 3, 3)
    assert len([name for name in theirs if "bbox_embed1" in name]) == 4
    assert len([name for name in theirs if "linear31" in name]) == 3
    back = OPENDET_RULES.to_ours(theirs, shapes)
    jax.tree.map(np.testing.assert_array_equal, back, ours)


def test_another_model_is_refused():
    with pytest.raises(WeightsError, match=r"not a checkpoint of Open-Det: of its 1 names \(encoder\.weight, …\)"):
        opendet_config({"encoder.weight": (3, 4)})
