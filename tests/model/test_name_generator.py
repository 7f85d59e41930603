"""The name generator: likelihoods, padding, prompts' normalisation and dropout, and generation against likelihood."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from opendet_jax.config import Ablation, ModelConfig, T5Config
from opendet_jax.model.name_generator import NameGenerator, Names, normalise_prompts

E, V = 16, 21
T5_SMALL = T5Config(vocab_size=V, num_layers=2, num_heads=2, head_width=8, ffn_width=32, head_bias=True)
CONFIG = ModelConfig(t5=T5_SMALL, text_width=E)
GENERATOR = NameGenerator(CONFIG, Ablation())
NAMES = jnp.array([[5, 9, 1, 0, 0], [7, 1, 0, 0, 0], [0, 0, 0, 0, 0], [3, 4, 5, 6, 1]])
PROMPTS = 4.0 * jax.random.normal(jax.random.key(1), (4, E))


def params_of(generator: NameGenerator, end_bias: float = 3.0) -> dict:
    """Random weights far from their start, with names of varied length."""

    def init(key):
        params = generator.init(key, PROMPTS, NAMES, True, method="token_losses")["params"]
        leaves, tree = jax.tree.flatten(params)
        keys = jax.random.split(key, len(leaves))
        leaves = [x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
        return jax.tree.unflatten(tree, leaves)

    params = jax.jit(init)(jax.random.key(0))
    head = params["t5"]["lm_head"]
    head["kernel"] *= 2.0
    head["bias"] = head["bias"].at[1].set(end_bias)
    return params


@pytest.fixture(scope="module")
def params() -> dict:
    return params_of(GENERATOR)


@jax.jit
def losses(params, prompts, tokens):
    return GENERATOR.apply({"params": params}, prompts, tokens, True, method="token_losses")


@jax.jit
def logits(params, prompts, tokens):
    return GENERATOR.apply({"params": params}, prompts, tokens, method="teacher_forced_logits")


def generate(params, prompts, num_beams=3, length=8, generator=GENERATOR):
    run = jax.jit(lambda p, x: generator.apply({"params": p}, x, num_beams, length, method="generate"))
    return run(params, prompts)


def test_losses_are_minus_log_likelihood(params):
    got = losses(params, PROMPTS, NAMES)
    unit = PROMPTS / jnp.linalg.norm(PROMPTS, axis=1, keepdims=True)
    likelihood = jax.nn.log_softmax(logits(params, unit, NAMES))
    want = -np.take_along_axis(np.asarray(likelihood), np.asarray(NAMES)[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(got, np.where(NAMES != 0, want, 0.0), atol=2e-5)


def test_padding_is_zero_and_influences_nothing(params):
    """A row without a name: whatever its prompt, NaN included, no loss and no gradient changes by a bit."""

    def total(params, prompts):
        return jnp.sum(jnp.sin(losses(params, prompts, NAMES)))

    gradients = jax.jit(jax.grad(total, argnums=(0, 1)))

    def run(prompts):
        return losses(params, prompts, NAMES), gradients(params, prompts)

    want, (of_params, of_prompts) = run(PROMPTS)
    assert (np.asarray(want)[np.asarray(NAMES) == 0] == 0).all()
    assert not of_prompts[2].any()
    for content in (0.0, 1e9, jnp.nan):
        got = run(PROMPTS.at[2].set(content))
        jax.tree.map(np.testing.assert_array_equal, got, (want, (of_params, of_prompts)))
    # A longer padding changes nothing either.
    wider = losses(params, PROMPTS, jnp.pad(NAMES, ((0, 0), (0, 3))))
    np.testing.assert_allclose(wider[:, :5], want, rtol=1e-5, atol=1e-6)
    assert not wider[:, 5:].any()


def test_normalise_at_zero():
    x = jnp.zeros((2, E)).at[1, 0].set(2.0)
    np.testing.assert_allclose(normalise_prompts(x)[1], jnp.eye(E)[0], atol=1e-6)
    assert np.isfinite(jax.jacobian(normalise_prompts)(x)).all()


@pytest.mark.parametrize("num_beams", [1, 3])
def test_scores_are_the_likelihood_of_what_is_returned(params, num_beams):
    """Cache, lineage and merged head against the teacher-forced pass: log-probabilities up to </s>, over the length."""
    prompts = jax.random.normal(jax.random.key(2), (12, E))
    names = generate(params, prompts, num_beams)
    assert isinstance(names, Names)
    assert names.tokens.shape == (12, num_beams, 9)
    ended = 0
    for beam in range(num_beams):
        tokens = names.tokens[:, beam]
        assert not tokens[:, 0].any()
        targets = tokens[:, 1:]
        likelihood = jax.nn.log_softmax(logits_of_all(params, prompts, targets))
        chosen = np.take_along_axis(np.asarray(likelihood), np.asarray(targets)[..., None], axis=-1)[..., 0]
        for row in range(12):
            ends = np.flatnonzero(np.asarray(targets[row]) == 1)
            count = ends[0] + 1 if len(ends) else 8
            ended += len(ends)
            assert not targets[row, count:].any()
            length = count if len(ends) else 9  # tokens before </s>, the start token counted
            np.testing.assert_allclose(names.scores[row, beam], chosen[row, :count].sum() / length, atol=1e-5)
    assert ended > 0
    assert (np.diff(names.scores, axis=1) <= 0).all()


@jax.jit
def logits_of_all(params, prompts, targets):
    """Teacher-forced logits; generated zeros are tokens here, not padding, and all are seen by those after them."""

    def run(generator):
        memory = generator.t5.encode(prompts[:, None])
        shifted = jnp.pad(targets[:, :-1], ((0, 0), (1, 0)))
        return generator.t5.head(generator.t5.decode(shifted, memory, jnp.ones(targets.shape, bool)))

    return GENERATOR.apply({"params": params}, method=run)


def test_rows_are_named_alone(params):
    prompts = jax.random.normal(jax.random.key(2), (6, E))
    together = generate(params, prompts)
    changed = generate(params, prompts.at[3:].set(100.0))
    np.testing.assert_array_equal(changed.tokens[:3], together.tokens[:3])
    np.testing.assert_array_equal(changed.scores[:3], together.scores[:3])


def test_prompts_are_normalised_at_inference_only_on_request(params):
    scaled = 3.0 * PROMPTS
    as_they_are = generate(params, PROMPTS)
    assert (generate(params, scaled).scores != as_they_are.scores).any()
    config = dataclasses.replace(CONFIG, normalise_prompts_at_inference=True)
    unit = NameGenerator(config, Ablation())
    want = generate(params, normalise_prompts(PROMPTS))
    for prompts in (PROMPTS, scaled):
        got = generate(params, prompts, generator=unit)
        np.testing.assert_array_equal(got.tokens, want.tokens)
        np.testing.assert_allclose(got.scores, want.scores, atol=1e-5)


def test_dropout_needs_its_key_and_acts(params):
    def sample(key):
        return GENERATOR.apply({"params": params}, PROMPTS, NAMES, False, method="token_losses", rngs={"dropout": key})

    first, again, other = (jax.jit(sample)(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (np.asarray(first != other) == np.asarray(NAMES != 0)).all()


def test_a_row_drops_the_same_wherever_it_stands(params):
    """With its key, in another order and beside fewer rows, as chunks and devices have it."""

    @jax.jit
    def sample(prompts, tokens, keys):
        return GENERATOR.apply({"params": params}, prompts, tokens, False, keys, method="token_losses")

    keys = jax.random.split(jax.random.key(2), 4)
    want = sample(PROMPTS, NAMES, keys)
    assert np.abs(want - losses(params, PROMPTS, NAMES)).max() > 0.01
    for order in ([3, 1, 2, 0], [0, 3]):
        order = jnp.array(order)
        np.testing.assert_allclose(sample(PROMPTS[order], NAMES[order], keys[order]), want[order], atol=1e-5)


def test_without_lora():
    generator = NameGenerator(CONFIG, Ablation(lora_head=False))
    shapes = jax.eval_shape(lambda: generator.init(jax.random.key(0), PROMPTS, NAMES, True, method="token_losses"))
    assert not [path for path in flatten_dict(shapes["params"]) if "lora" in path[-1]]
    assert generate(params_of(generator), PROMPTS, generator=generator).tokens.shape == (4, 3, 9)


def test_unused_projections_have_zero_gradient(params):
    """One encoder position: queries, keys and position biases of the encoder, and the cross-attention's, do nothing."""
    gradient = flatten_dict(jax.jit(jax.grad(lambda p: losses(p, PROMPTS, NAMES).sum()))(params))
    for path, value in gradient.items():
        idle = ("encoder" in path or "EncDecAttention" in path) and path[-2] in ("q", "k", "relative_attention_bias")
        # What attends from the decoder is normed by a layer norm that then serves nothing.
        idle |= path[1] == "decoder" and path[3:] == ("layer_1", "layer_norm", "scale")
        assert bool(np.any(value)) != idle, path


def test_bfloat16(params):
    generator = NameGenerator(dataclasses.replace(CONFIG, dtype="bfloat16"), Ablation())
    assert {x.dtype for x in jax.tree.leaves(params_of(generator))} == {jnp.dtype("float32")}
    apply = jax.jit(lambda p: generator.apply({"params": p}, PROMPTS, NAMES, True, method="token_losses"))
    got = apply(params)
    want = losses(params, PROMPTS, NAMES)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, atol=0.05 * want.max())
    names = generate(params, PROMPTS, generator=generator)
    assert names.scores.dtype == jnp.float32
    assert np.isfinite(names.scores).all()


def test_full_size_shapes():
    """Flan-T5-base: 247.6 M numbers, and 0.53 M in each LoRA; nothing is computed."""
    generator = NameGenerator(ModelConfig(), Ablation())
    prompts, tokens = jnp.zeros((2, 768)), jnp.ones((2, 4), jnp.int32)
    variables = jax.eval_shape(lambda: generator.init(jax.random.key(0), prompts, tokens, True, method="token_losses"))
    lora = 2 * 526_336
    assert sum(x.size for x in jax.tree.leaves(variables)) == 247_577_856 + lora

    def generated(variables):
        names = generator.apply(variables, prompts, 3, 30, method="generate")
        return names.tokens, names.scores

    tokens, scores = jax.eval_shape(generated, variables)
    assert (tokens.shape, scores.shape) == ((2, 3, 31), (2, 3))
