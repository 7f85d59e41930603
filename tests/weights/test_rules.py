"""The engine: both directions, and one error that lists everything."""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from opendet_jax.errors import WeightsError
from opendet_jax.weights.rules import CONV, LINEAR, Part, Rule, Rules, dense, flat

RULES = Rules(
    (
        *dense("block.{i}.fc{n}", "blocks_{i}/fc{n}"),
        *(
            rule
            for k, name in enumerate("qkv")
            for rule in (
                Rule(f"{name}.weight", "attention/qkv/kernel", LINEAR, Part(k, 3)),
                Rule(f"{name}.bias", "attention/qkv/bias", part=Part(k, 3)),
            )
        ),
        Rule("stem.weight", "stem/kernel", CONV),
        Rule("alias.weight", "stem/kernel", CONV),
        Rule("counter", None),
    )
)
WANTED = {
    "blocks_0/fc1/kernel": (3, 2),
    "blocks_0/fc1/bias": (2,),
    "attention/qkv/kernel": (4, 6),
    "attention/qkv/bias": (6,),
    "stem/kernel": (2, 2, 3, 5),
}


def source() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    state = {"block.0.fc1.weight": draw(2, 3), "block.0.fc1.bias": draw(2), "stem.weight": draw(5, 3, 2, 2)}
    for name in "qkv":
        state |= {f"{name}.weight": draw(2, 4), f"{name}.bias": draw(2)}
    return state | {"alias.weight": state["stem.weight"].copy(), "counter": np.zeros((), np.int64)}


def test_layouts_and_parts():
    state = source()
    ours = flat(RULES.to_ours(state, WANTED))
    assert {path: value.shape for path, value in ours.items()} == WANTED
    np.testing.assert_array_equal(ours["blocks_0/fc1/kernel"], state["block.0.fc1.weight"].T)
    np.testing.assert_array_equal(ours["stem/kernel"][1, 0, 2], state["stem.weight"][:, 2, 1, 0])
    np.testing.assert_array_equal(ours["attention/qkv/kernel"][:, 2:4], state["k.weight"].T)
    np.testing.assert_array_equal(ours["attention/qkv/bias"][4:], state["v.bias"])


def test_there_and_back_is_exact():
    state = source()
    back = RULES.to_theirs(RULES.to_ours(state, WANTED))
    assert set(back) == set(state) - {"counter"}
    for name, value in back.items():
        np.testing.assert_array_equal(value, state[name])
        assert value.dtype == np.float32
        assert value.flags.c_contiguous


def test_safetensors_gets_arrays_as_they_lie(tmp_path):
    """safetensors (0.8.0) writes the memory of an array that is not contiguous, in the wrong order, without a word: a
    transposed kernel comes back scrambled. What is exported is therefore made contiguous (Rules.to_theirs)."""
    kernel = np.arange(12, dtype=np.float32).reshape(3, 4)
    save_file({"transposed": kernel.T}, tmp_path / "as_it_lies.safetensors")
    scrambled = load_file(tmp_path / "as_it_lies.safetensors")["transposed"]
    assert scrambled.shape == (4, 3)
    assert not np.array_equal(scrambled, kernel.T)  # where this fails, safetensors has been mended

    qkv = np.concatenate([kernel, -kernel, 2 * kernel], axis=-1)
    convolution = np.arange(120, dtype=np.float32).reshape(2, 2, 3, 10)[..., ::2]
    ours = {"blocks_0": {"fc1": {"kernel": kernel}}, "attention": {"qkv": {"kernel": qkv}}}
    ours |= {"stem": {"kernel": convolution}}
    state = RULES.to_theirs(ours)
    save_file(state, tmp_path / "exported.safetensors")
    back = load_file(tmp_path / "exported.safetensors")
    np.testing.assert_array_equal(back["block.0.fc1.weight"], kernel.T)
    np.testing.assert_array_equal(back["k.weight"], -kernel.T)
    np.testing.assert_array_equal(back["stem.weight"], convolution.transpose(3, 2, 0, 1))


def test_everything_wrong_is_listed_at_once():
    state = source()
    del state["k.weight"], state["block.0.fc1.bias"]
    state["stranger"] = np.zeros((7, 8))
    state["block.1.fc1.bias"] = np.zeros(2)
    state["block.0.fc1.weight"] = np.zeros((2, 4))
    state["alias.weight"][0, 0, 0, 0] += 1
    with pytest.raises(WeightsError) as error:
        RULES.to_ours(state, WANTED)
    message = str(error.value)
    assert "stranger (7, 8)" in message
    assert "block.1.fc1.bias (2,): the model has no blocks_1/fc1/bias" in message
    assert "attention/qkv/kernel (4, 6), in theirs k.weight" in message
    assert "blocks_0/fc1/bias (2,), in theirs block.0.fc1.bias" in message
    assert "block.0.fc1.weight is (4, 2) in our layout, blocks_0/fc1/kernel is (3, 2)" in message
    assert "alias.weight and stem.weight, which both are stem/kernel" in message


def test_half_precision_becomes_float32():
    state = {name: value.astype(np.float16) for name, value in source().items()}
    assert all(value.dtype == np.float32 for value in flat(RULES.to_ours(state, WANTED)).values())


def test_a_parameter_without_a_name_is_an_error():
    with pytest.raises(WeightsError, match="1 parameters have no name in that layout:\n  other/kernel"):
        RULES.to_theirs({"other": {"kernel": np.zeros(1)}, "stem": {"kernel": np.zeros((2, 2, 3, 5))}})
