"""The name generator against the authors' numbers: encoder, teacher-forced logits, loss, greedy and beam search."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from opendet_jax.config import Ablation, ModelConfig, T5Config
from opendet_jax.model.name_generator import NameGenerator, normalise
from opendet_jax.model.t5 import relative_buckets
from opendet_jax.weights.rules import convert
from opendet_jax.weights.t5 import AUTHORS, T5_RULES
from tests.parity.vectors import Vectors, state_dict

SMALL = T5Config(
    vocab_size=512, num_layers=2, ffn_width=256, activation="gelu_erf", head_bias=True
)  # section 1 of the vectors' description
GENERATOR = NameGenerator(ModelConfig(t5=SMALL), Ablation())


@pytest.fixture(scope="module")
def variables(vectors_folder):
    state = state_dict(vectors_folder, Vectors(vectors_folder / "eval_a.npz"))
    state = {name: value for name, value in state.items() if name.startswith(AUTHORS)}
    return {"params": convert(state, T5_RULES)["name_generator"]}


@pytest.fixture(params=["eval_a", "eval_b"])
def evaluated(request, vectors_folder) -> Vectors:
    return Vectors(vectors_folder / f"{request.param}.npz")


def tokens_of(targets: np.ndarray) -> jax.Array:
    return jnp.asarray(np.where(targets == -100, 0, targets))


@jax.jit
def logits(variables, prompts, tokens):
    return GENERATOR.apply(variables, prompts, tokens, True, method="teacher_forced_logits")


@jax.jit
def token_losses(variables, prompts, tokens):
    return GENERATOR.apply(variables, prompts, tokens, True, method="token_losses")


def generate(variables, prompts, num_beams):
    return jax.jit(lambda v, p: GENERATOR.apply(v, p, num_beams, 12, method="generate"))(variables, prompts)


def test_converted_tree_is_the_models_own(variables):
    inputs = (jnp.zeros((2, 768)), jnp.ones((2, 3), jnp.int32), True)
    fresh = jax.eval_shape(lambda: GENERATOR.init(jax.random.key(0), *inputs, method="token_losses"))
    want = flatten_dict(jax.tree.map(np.shape, fresh["params"], is_leaf=lambda x: hasattr(x, "shape")))
    assert flatten_dict(jax.tree.map(np.shape, variables["params"])) == want


def test_rules_cover_the_full_checkpoint(vectors_folder):
    names = [
        line.split("\t")[0]
        for line in (vectors_folder / "official_state_dict.txt").read_text().splitlines()
        if line.startswith(AUTHORS)
    ]
    tree = convert({name: np.zeros((1, 1)) for name in names}, T5_RULES)
    # 12 + 12 blocks, their tables of biases, two norms; matrix and two factors of each LoRA, head bias.
    assert len(flatten_dict(tree)) == 12 * (9 + 14) + 2 + 2 + 3 + 4


def test_relative_buckets(vectors_folder):
    units = Vectors(vectors_folder / "units.npz")
    distance = units["t5_buckets/relative_position"]
    for key, bidirectional in (("bidirectional", True), ("causal", False)):
        got = relative_buckets(distance, bidirectional, 32, 128)
        np.testing.assert_array_equal(got, units[f"t5_buckets/{key}"])


def test_encoder(variables, evaluated):
    encode = jax.jit(lambda v, p: GENERATOR.apply(v, p, method=lambda m, p: m.t5.encode(p, True)))
    memory = encode(variables, evaluated["t5/input"][:, None])
    evaluated.assert_close("t5/encoder", memory[:, 0], 1e-5)


def test_teacher_forced_logits_and_loss(variables, evaluated):
    targets = evaluated["t5/targets"]
    got = logits(variables, evaluated["t5/input"], tokens_of(targets))
    evaluated.assert_close("t5/logits", got, 1e-4)
    likelihood = jax.nn.log_softmax(got)
    rows, places = np.nonzero(targets != -100)
    loss = -np.asarray(likelihood)[rows, places, targets[rows, places]].astype(np.float64).mean()
    np.testing.assert_allclose(loss, evaluated["t5/loss"], rtol=1e-5)


def test_greedy(variables, evaluated):
    names = generate(variables, evaluated["t5/input"], 1)
    np.testing.assert_array_equal(names.tokens[:, 0], evaluated["t5/greedy"])


def test_beams(variables, evaluated):
    names = generate(variables, evaluated["t5/input"], 3)
    np.testing.assert_array_equal(names.tokens, evaluated["t5/beam_tokens"])
    evaluated.assert_close("t5/beam_scores", names.scores, 1e-5)


@pytest.mark.parametrize("file", ["train_a", "train_b"])
def test_training(variables, vectors_folder, file):
    vectors = Vectors(vectors_folder / f"{file}.npz")
    keys = [("names_input", "names_logits", vectors["t5/names_targets"])]
    objects = vectors["objects/tokens"]
    for image, count in enumerate(vectors["objects/count"]):
        keys.append((f"noise_input_{image}", f"noise_logits_{image}", objects[image, :count]))
    means = []
    for prompts_key, logits_key, targets in keys:
        prompts, tokens = vectors[f"t5/{prompts_key}"], tokens_of(targets)
        vectors.assert_close(f"t5/{logits_key}", logits(variables, prompts, tokens), 1e-4)
        # The stored prompts are normalised already; once more changes them by 1e-6 of their size.
        np.testing.assert_allclose(normalise(jnp.asarray(prompts)), prompts, atol=1e-6)
        losses = np.asarray(token_losses(variables, prompts, tokens), np.float64)
        assert (losses[targets == -100] == 0).all()
        means.append(losses[targets != -100].mean())
    stored = dict(zip(vectors["clean/loss/names"].tolist(), vectors["clean/loss/unweighted"].tolist(), strict=True))
    np.testing.assert_allclose(means[0], stored["t5_loss"], rtol=1e-5)
    np.testing.assert_allclose(np.mean(means[1:]), stored["t5_clip_noise"], rtol=1e-5)
