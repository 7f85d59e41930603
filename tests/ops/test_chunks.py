"""Items packed into chunks, and loops over the chunks that hold some."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opendet_jax.ops.chunks import live_chunks, pack

REAL = np.array([[1, 1, 0], [0, 0, 0], [1, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 0]], bool)
VALUES = np.random.default_rng(0).normal(size=(6, 3, 2)).astype(np.float32)


def chunk_values(shared, places):
    """Something of every item, its row and its position, that a whole row takes part in."""
    values, matrix = shared
    same = (places.row[:, None] == places.row) & places.real
    mixed = jnp.where(same[..., None], values[places.row, places.position] @ matrix, 0.0).sum(1)
    return jnp.sin(mixed) * (1.0 + places.position[:, None])


def at_once(values, matrix, real):
    sums = jnp.where(real[..., None], values @ matrix, 0.0).sum(1, keepdims=True)
    return jnp.where(real[..., None], jnp.sin(sums) * (1.0 + jnp.arange(real.shape[1])[:, None]), 0.0)


def by_chunks(values, matrix, real, size):
    packing = pack(jnp.asarray(real), size)
    found = live_chunks(chunk_values, (values, matrix), packing.places, packing.live)
    return jnp.where(real[..., None], packing.unpack(found), 0.0)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**18 - 1), st.sampled_from([3, 4, 5, 7, 21]))
def test_every_real_item_has_its_place(bits, size):
    """Once, whole rows in one chunk, and no chunk is alive without an item."""
    real = np.array([(bits >> i) & 1 for i in range(18)], bool).reshape(6, 3)
    packing = pack(jnp.asarray(real), size)
    places = [np.asarray(x) for x in (packing.places.row, packing.places.position, packing.places.real)]
    row, position, there = places
    assert there.sum() == real.sum()
    assert set(zip(row[there].tolist(), position[there].tolist(), strict=True)) == set(
        zip(*np.nonzero(real), strict=True)
    )
    flat = np.asarray(packing.place)[real]
    chunk, place = np.divmod(flat, size)
    np.testing.assert_array_equal(row[chunk, place], np.nonzero(real)[0])
    np.testing.assert_array_equal(position[chunk, place], np.nonzero(real)[1])
    for number in np.unique(np.nonzero(real)[0]):
        assert len(set(chunk[np.nonzero(real)[0] == number])) == 1
    assert (np.asarray(packing.place) >= 0).all()
    assert (np.asarray(packing.place) < row.size).all()
    assert not there[int(packing.live) :].any()
    assert int(packing.live) == -(-int(real.sum()) // (size - 2))


@pytest.mark.parametrize("size", [3, 5, 64])
def test_chunks_change_nothing(size):
    matrix = jnp.asarray(np.random.default_rng(1).normal(size=(2, 4)), jnp.float32)
    cotangent = jnp.asarray(np.random.default_rng(2).normal(size=(6, 3, 4)), jnp.float32)
    want, want_pull = jax.vjp(lambda v, m: at_once(v, m, REAL), VALUES, matrix)
    got, got_pull = jax.vjp(jax.jit(lambda v, m: by_chunks(v, m, REAL, size)), VALUES, matrix)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    for a, b in zip(got_pull(cotangent), want_pull(cotangent), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_only_chunks_that_hold_something_are_computed():
    calls = []

    def function(shared, places):
        jax.debug.callback(lambda: calls.append(1))
        return shared * places.row

    def count(real, size):
        calls.clear()
        packing = pack(jnp.asarray(real), size)
        live_chunks(function, jnp.float32(1.0), packing.places, packing.live).block_until_ready()
        jax.effects_barrier()
        return len(calls)

    assert REAL.sum() == 8
    assert count(REAL, 3) == 8
    assert count(REAL, 6) == 2
    assert count(REAL, 18) == 1
    assert count(np.zeros_like(REAL), 6) == 0


def test_nothing_real_gives_no_gradient():
    nothing = np.zeros_like(REAL)
    value, gradients = jax.value_and_grad(lambda v, m: by_chunks(v, m, nothing, 5).sum(), argnums=(0, 1))(
        jnp.asarray(VALUES), jnp.ones((2, 4))
    )
    assert value == 0
    assert all((g == 0).all() for g in gradients)


def test_a_row_that_does_not_fit():
    with pytest.raises(ValueError, match="a row of 3 items does not go into a chunk of 2"):
        pack(jnp.asarray(REAL), 2)
