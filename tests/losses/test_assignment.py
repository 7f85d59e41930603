"""Masked optimal assignment against scipy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from opendet_jax.losses.matching import assign

assign_all = jax.jit(jax.vmap(assign))


def check(cost, query_valid, column_valid, query):
    """`query` serves as many valid columns as possible, each query once, at the least total cost."""
    assert (query[~column_valid] == -1).all()
    served = query >= 0
    assert served.sum() == min(query_valid.sum(), column_valid.sum())
    assert query_valid[query[served]].all()
    assert len(set(query[served].tolist())) == served.sum()
    real = cost[query_valid][:, column_valid].astype(np.float64)
    best = real[linear_sum_assignment(real)].sum()
    got = cost[query[served], np.flatnonzero(served)].astype(np.float64).sum()
    assert got <= best + 1e-5 * np.abs(real).max(initial=1.0) * max(served.sum(), 1)


@pytest.mark.parametrize(("queries", "columns"), [(12, 9), (9, 9), (5, 9)])
def test_is_optimal_under_random_masks(queries, columns):
    rng = np.random.default_rng(0)
    cost = rng.normal(size=(64, queries, columns)).astype(np.float32) * rng.choice([0.1, 10, 100], (64, 1, 1))
    cost = cost.astype(np.float32)
    query_valid = rng.random((64, queries)) < rng.random((64, 1))
    column_valid = rng.random((64, columns)) < rng.random((64, 1))
    query_valid[0], column_valid[0] = True, True
    query_valid[1], column_valid[1] = False, True
    query_valid[2], column_valid[2] = True, False
    for case in zip(
        cost, query_valid, column_valid, np.asarray(assign_all(cost, query_valid, column_valid)), strict=True
    ):
        check(*case)


def test_is_optimal_at_the_size_of_training():
    """900 queries and 2 × 100 columns that are copies of one another; costs as in docs/method.md#8-matching."""
    rng = np.random.default_rng(1)
    cost = np.tile(rng.uniform(-2, 30, (2, 900, 100)).astype(np.float32), (1, 1, 2))
    column_valid = np.tile(np.arange(100) < np.array([[37], [100]]), (1, 2))
    query_valid = np.arange(900) < np.array([[900], [150]])
    query = np.asarray(assign_all(cost, query_valid, column_valid))
    for case in zip(cost, query_valid, column_valid, query, strict=True):
        check(*case)


@pytest.mark.parametrize(("queries", "columns"), [(9, 5), (12, 3), (6, 6)])
def test_equal_costs_as_scipy_has_them(queries, columns):
    """Few different costs: many assignments are the best one."""
    cost = np.random.default_rng(4).integers(0, 4, (200, queries, columns)).astype(np.float32)
    valid = np.ones((200, queries), bool), np.ones((200, columns), bool)
    for one, query in zip(cost, np.asarray(assign_all(cost, *valid)), strict=True):
        np.testing.assert_array_equal(query, linear_sum_assignment(one.T)[1])


def test_serves_the_cheapest_columns_when_queries_are_short():
    cost = jnp.array([[5.0, 1.0, 9.0, 2.0], [4.0, 8.0, 7.0, 0.0], [-9.0, -9.0, -9.0, -9.0]])
    query = assign(cost, jnp.array([True, True, False]), jnp.array([True, True, True, True]))
    np.testing.assert_array_equal(query, [-1, 0, -1, 1])


def test_nearly_equal_costs_keep_their_order_when_queries_are_short():
    """The constant for invalid queries must not swallow differences of a few float32 units."""
    cost = np.full((3, 8), 10.0, np.float32)
    cost[0, 6] = cost[1, 2] = np.nextafter(np.float32(10), np.float32(9), dtype=np.float32) - np.float32(2e-6)
    query = assign(jnp.asarray(cost), jnp.array([True, True, False]), jnp.ones(8, bool))
    assert query[6] == 0
    assert query[2] == 1
    assert (np.delete(np.asarray(query), [2, 6]) == -1).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite(bad):
    cost = np.random.default_rng(2).normal(size=(6, 3)).astype(np.float32)
    everywhere = np.ones(6, bool), np.ones(3, bool)
    clean = np.asarray(assign(jnp.asarray(cost), *map(jnp.asarray, everywhere)))
    cost[np.setdiff1d(np.arange(6), clean)] = bad  # rows that were not chosen
    np.testing.assert_array_equal(assign(jnp.asarray(cost), *map(jnp.asarray, everywhere)), clean)
    cost[:] = bad
    query = np.asarray(assign(jnp.asarray(cost), *map(jnp.asarray, everywhere)))
    assert len(set(query.tolist())) == 3
    assert ((query >= 0) & (query < 6)).all()


def test_masked_numbers_have_no_influence():
    rng = np.random.default_rng(3)
    cost = rng.normal(size=(8, 5)).astype(np.float32)
    query_valid, column_valid = np.arange(8) % 3 > 0, np.array([True, False, True, True, False])
    want = assign(jnp.asarray(cost), jnp.asarray(query_valid), jnp.asarray(column_valid))
    for poison in (np.nan, np.inf, -1e30, 1e30):
        other = np.where(query_valid[:, None] & column_valid, cost, np.float32(poison))
        got = assign(jnp.asarray(other), jnp.asarray(query_valid), jnp.asarray(column_valid))
        np.testing.assert_array_equal(got, want)
