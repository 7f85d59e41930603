"""The name generator against the authors' numbers: encoder, teacher-forced logits, loss, greedy and beam search."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from opendet_jax.config import Ablation, ModelConfig, T5Config
from opendet_jax.model.name_generator import NameGenerator, normalise_prompts
from tests.parity import report
from tests.parity.vectors import STAGE, Vectors, params_of

LOGITS, LOSS = 1e-4, 1e-5
# The T5 that the vectors were made with.
SMALL = T5Config(vocab_size=512, num_layers=2, ffn_width=256, activation="gelu_erf", head_bias=True)
GENERATOR = NameGenerator(ModelConfig(t5=SMALL), Ablation())


def variables_of(vectors: Vectors) -> dict:
    return {"params": params_of(vectors, "name_generator")["name_generator"]}


def tokens_of(targets: np.ndarray) -> jax.Array:
    return jnp.asarray(np.where(targets == -100, 0, targets))


@jax.jit
def logits(variables, prompts, tokens):
    return GENERATOR.apply(variables, prompts, tokens, method="teacher_forced_logits")


@jax.jit
def token_losses(variables, prompts, tokens):
    return GENERATOR.apply(variables, prompts, tokens, True, method="token_losses")


def generate(vectors: Vectors, num_beams: int, new_tokens: int):
    run = jax.jit(lambda v, p: GENERATOR.apply(v, p, num_beams, new_tokens, method="generate"))
    return run(variables_of(vectors), vectors["t5/input"])


def test_converted_tree_is_the_models_own(eval_vectors):
    inputs = (jnp.zeros((2, 768)), jnp.ones((2, 3), jnp.int32), True)
    fresh = jax.eval_shape(lambda: GENERATOR.init(jax.random.key(0), *inputs, method="token_losses"))
    want = {path: leaf.shape for path, leaf in flatten_dict(fresh["params"]).items()}
    assert {path: leaf.shape for path, leaf in flatten_dict(variables_of(eval_vectors)["params"]).items()} == want


@pytest.mark.needs("t5/input", "t5/encoder")
def test_encoder(eval_vectors):
    encode = jax.jit(lambda v, p: GENERATOR.apply(v, p, method=lambda m, p: m.t5.encode(p)))
    memory = encode(variables_of(eval_vectors), eval_vectors["t5/input"][:, None])
    eval_vectors.assert_close("T5 encoder", "t5/encoder", memory[:, 0], STAGE)


@pytest.mark.needs("t5/input", "t5/targets")
def test_teacher_forced_logits_and_loss(eval_vectors):
    targets = eval_vectors["t5/targets"]
    got = logits(variables_of(eval_vectors), eval_vectors["t5/input"], tokens_of(targets))
    eval_vectors.assert_close("T5 logits, teacher-forced", "t5/logits", got, LOGITS)
    likelihood = jax.nn.log_softmax(got)
    rows, places = np.nonzero(targets != -100)
    loss = -np.asarray(likelihood)[rows, places, targets[rows, places]].astype(np.float64).mean()
    report.enter("T5 loss", eval_vectors.name, eval_vectors["t5/loss"], loss, LOSS, relative=True)
    np.testing.assert_allclose(loss, eval_vectors["t5/loss"], rtol=LOSS)


@pytest.mark.needs("t5/input", "t5/greedy")
def test_greedy(eval_vectors):
    names = generate(eval_vectors, 1, eval_vectors["t5/greedy"].shape[1] - 1)
    eval_vectors.assert_equal("greedy tokens", "t5/greedy", names.tokens[:, 0])


@pytest.mark.needs("t5/input", "t5/beam_tokens")
def test_beams(eval_vectors):
    _, beams, length = eval_vectors["t5/beam_tokens"].shape
    names = generate(eval_vectors, beams, length - 1)
    eval_vectors.assert_equal("beam tokens", "t5/beam_tokens", names.tokens)
    eval_vectors.assert_close("beam scores", "t5/beam_scores", names.scores, STAGE)


@pytest.mark.needs("t5/names_input", "t5/names_targets", "objects/tokens", "clean/loss/names")
def test_training(train_vectors):
    vectors, variables = train_vectors, variables_of(train_vectors)
    keys = [("names_input", "names_logits", vectors["t5/names_targets"])]
    objects = vectors["objects/tokens"]
    for image, count in enumerate(vectors["objects/count"]):
        keys.append((f"noise_input_{image}", f"noise_logits_{image}", objects[image, :count]))
    means = []
    for prompts_key, logits_key, targets in keys:
        prompts, tokens = vectors[f"t5/{prompts_key}"], tokens_of(targets)
        vectors.assert_close(
            "T5 logits, teacher-forced", f"t5/{logits_key}", logits(variables, prompts, tokens), LOGITS
        )
        # The stored prompts are normalised already; once more changes them by 1e-6 of their size.
        np.testing.assert_allclose(normalise_prompts(jnp.asarray(prompts)), prompts, atol=1e-6)
        losses = np.asarray(token_losses(variables, prompts, tokens), np.float64)
        assert (losses[targets == -100] == 0).all()
        means.append(losses[targets != -100].mean())
    stored = dict(zip(vectors["clean/loss/names"].tolist(), vectors["clean/loss/unweighted"].tolist(), strict=True))
    for name, mean in (("t5_loss", means[0]), ("t5_clip_noise", np.mean(means[1:]))):
        report.enter("T5 loss", vectors.name, stored[name], mean, LOSS, relative=True)
        np.testing.assert_allclose(mean, stored[name], rtol=LOSS)
