"""LoRA head and embedding: their formulas, their start, and the head's merged form
(docs/method.md#7-object-name-generator).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opendet_jax.model.lora import LoRAEmbedding, LoRAHead

V, E, RANK = 11, 6, 2
F32 = jnp.dtype("float32")
HIDDEN = jax.random.normal(jax.random.key(1), (3, 4, E))
TOKENS = jnp.array([[0, 3, 10], [7, 7, 1]])


def randomised(params):
    """Every number away from its start, which hides a part: one factor is zero there."""
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(1)
    return tree.unflatten([jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32) for leaf in leaves])


def test_embedding():
    module = LoRAEmbedding(V, E, RANK, 1 / 16, F32)
    params = module.init(jax.random.key(0), TOKENS)["params"]
    np.testing.assert_array_equal(module.apply({"params": params}, TOKENS), params["embedding"][TOKENS])
    assert not params["lora_A"].any()
    assert 0.5 < params["lora_B"].std() < 1.5
    p = randomised(params)
    b_a = p["lora_B"].T @ p["lora_A"].T  # the paper's B [E, r] times A [r, V]
    want = p["embedding"][TOKENS] + b_a.T[TOKENS] / 16
    np.testing.assert_allclose(module.apply({"params": p}, TOKENS), want, atol=1e-6)


@pytest.mark.parametrize("bias", [False, True])
def test_head(bias):
    module = LoRAHead(V, E, RANK, 1 / 16, bias, F32)
    params = module.init(jax.random.key(0), HIDDEN)["params"]
    assert ("bias" in params) == bias
    np.testing.assert_allclose(
        module.apply({"params": params}, HIDDEN), HIDDEN @ params["kernel"], atol=1e-6
    )  # B is zero
    p = randomised(params)
    want = HIDDEN @ p["kernel"] + HIDDEN @ p["lora_A"] @ p["lora_B"] / 16 + p.get("bias", 0)
    np.testing.assert_allclose(module.apply({"params": p}, HIDDEN), want, atol=1e-5)
    merged = module.apply({"params": p}, method="merged")
    got = module.apply({"params": p}, HIDDEN, merged, method="apply_merged")
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_factor_a_is_kaiming_uniform():
    module = LoRAHead(V, 400, 16, 1 / 16, False, F32)
    a = module.init(jax.random.key(0), jnp.zeros((1, 400)))["params"]["lora_A"]
    assert 0.99 / 20 < abs(a).max() <= 1 / 20
    np.testing.assert_allclose(a.std(), 1 / 20 / 3**0.5, rtol=0.05)


def test_rank_zero_is_plain():
    head = LoRAHead(V, E, 0, 1 / 16, False, F32)
    embedding = LoRAEmbedding(V, E, 0, 1 / 16, F32)
    assert set(head.init(jax.random.key(0), HIDDEN)["params"]) == {"kernel"}
    assert set(embedding.init(jax.random.key(0), TOKENS)["params"]) == {"embedding"}


def test_bfloat16_logits_are_float32():
    head = LoRAHead(V, E, RANK, 1 / 16, True, jnp.dtype("bfloat16"))
    embedding = LoRAEmbedding(V, E, RANK, 1 / 16, jnp.dtype("bfloat16"))
    logits, variables = head.init_with_output(jax.random.key(0), HIDDEN)
    rows, _ = embedding.init_with_output(jax.random.key(0), TOKENS)
    assert (logits.dtype, rows.dtype) == (jnp.float32, jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {F32}


def test_paper_counts_of_trainable_numbers():
    shapes = jax.eval_shape(
        lambda: LoRAHead(32128, 768, 16, 1 / 16, False, F32).init(jax.random.key(0), jnp.zeros((1, 768)))
    )["params"]
    assert shapes["lora_A"].size + shapes["lora_B"].size == 526_336
    assert shapes["kernel"].size == 24_674_304
