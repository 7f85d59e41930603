"""Eq. 1 with its cap and its mask; proposals; the mean-of-linear head."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opendet_jax.model.query_selection import BinaryHead, QuerySelection, fill_as_program, proposals, select_best


def selected(logits, eligible, slots, minimum=3, threshold=0.5) -> list[list[int]]:
    index, valid = select_best(jnp.asarray(logits), jnp.asarray(eligible), slots, threshold, minimum)
    return [list(map(int, row[keep])) for row, keep in zip(np.asarray(index), np.asarray(valid), strict=True)]


def test_takes_what_passes_best_first_and_caps():
    logits = np.array([[-1.0, 2.0, 0.5, -3.0, 1.0, 3.0]], np.float32)
    everything = np.ones((1, 6), bool)
    assert selected(logits, everything, 6) == [[5, 1, 4, 2]]
    assert selected(logits, everything, 3) == [[5, 1, 4]]


def test_takes_the_best_where_nothing_passes():
    logits = np.array([[-1.0, -2.0, -0.5, -3.0, -4.0], [-1.0, 1.0, -0.5, -3.0, -4.0]], np.float32)
    assert selected(logits, np.ones((2, 5), bool), 5) == [[2, 0, 1], [1]]
    assert selected(logits, np.ones((2, 5), bool), 2) == [[2, 0], [1]]


def test_never_takes_padding_or_invalid_proposals():
    logits = np.array([[9.0, 2.0, -1.0, -2.0]], np.float32)
    assert selected(logits, [[False, True, True, True]], 4) == [[1]]
    assert selected(logits, [[False, False, True, True]], 4) == [[2, 3]]
    assert selected(logits, [[False, False, False, False]], 4) == [[]]


def test_program_fills_with_the_lowest_up_to_the_largest_count_of_the_batch():
    logits = jnp.array([[1.0, -1.0, 2.0, -3.0, 3.0, -2.0], [-5.0, -4.0, 1.0, -3.0, -2.0, -1.0]])
    index, valid = fill_as_program(logits, 5, 0.5, 2)
    np.testing.assert_array_equal(index[:, :3], [[0, 2, 4], [2, 0, 1]])
    np.testing.assert_array_equal(valid, [[True] * 3 + [False] * 2] * 2)
    index, valid = fill_as_program(logits, 2, 0.5, 2)  # more pass than fit: the best, by score
    np.testing.assert_array_equal(index, [[4, 2], [2, 0]])


def test_binary_head_is_the_mean_of_a_linear():
    x, kernel, bias = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(2, 5, 8), (8, 8), (8,)]))
    got = BinaryHead().apply({"params": {"kernel": kernel, "bias": bias}}, x)
    np.testing.assert_allclose(got, (x @ kernel + bias).mean(-1), atol=1e-6)


def test_proposals_count_cells_of_the_photograph(tiny_pyramids):
    _, memory = tiny_pyramids
    boxes, valid = proposals(memory)
    np.testing.assert_allclose(boxes[0, 0], [0.5 / 8, 0.5 / 6, 0.05, 0.05], rtol=1e-6)
    np.testing.assert_allclose(boxes[1, 9], [1.5 / 4, 1.5 / 4, 0.05, 0.05], rtol=1e-6)
    np.testing.assert_allclose(boxes[0, -1], [0.5, 0.5, 0.4, 0.4], rtol=1e-6)
    np.testing.assert_array_equal(valid, memory.valid)


@pytest.mark.parametrize("fill", ["none", "program"])
def test_slots_are_at_most_the_tokens(tiny, tiny_params, tiny_pyramids, fill):
    _, memory = tiny_pyramids
    tokens = memory.tokens.shape[1]
    module = QuerySelection(replace(tiny, max_queries=900, query_fill=fill, score_threshold=0.5))
    queries = jax.jit(module.apply)({"params": tiny_params["query_selection"]}, memory)
    assert queries.index.shape == (2, tokens)
    for index in np.asarray(queries.index):
        np.testing.assert_array_equal(np.sort(index), np.arange(tokens))
    assert np.isfinite(queries.boxes).all()
    assert np.isfinite(queries.content).all()


def test_at_initialisation_as_many_as_fit_are_taken(tiny, tiny_pyramids):
    _, memory = tiny_pyramids
    queries, _ = QuerySelection(tiny).init_with_output(jax.random.key(0), memory)
    np.testing.assert_array_equal(queries.valid.sum(axis=1), [24, 23])  # the second image has 23 valid tokens
    proposal, _ = proposals(memory)
    chosen = jnp.take_along_axis(proposal, queries.index[..., None], axis=1)
    real = np.asarray(queries.valid)
    np.testing.assert_allclose(queries.boxes[real], chosen[real], atol=1e-6)  # the box head starts at zero


def test_fixed_takes_exactly_the_minimum(tiny, tiny_params, tiny_pyramids):
    _, memory = tiny_pyramids
    params = {"params": tiny_params["query_selection"]}
    queries = QuerySelection(replace(tiny, score_threshold=0.9999), fixed=True).apply(params, memory)
    assert queries.valid.shape == (2, tiny.min_queries)
    assert queries.valid.all()
    best = QuerySelection(replace(tiny, score_threshold=0.0)).apply(params, memory)
    np.testing.assert_array_equal(queries.index, best.index[:, : tiny.min_queries])
