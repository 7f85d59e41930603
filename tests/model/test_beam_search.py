"""Beam search against the rule written out in plain Python, on small tables of next-token scores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opendet_jax.model.beam_search import _best_continuations, beam_search, make_trie

ROWS, VOCABULARY, LENGTH = 24, 9, 7


def tables(seed: int, end_bonus: float) -> np.ndarray:
    """Logits [row, position, token, next token]."""
    table = np.random.default_rng(seed).standard_normal((ROWS, LENGTH, VOCABULARY, VOCABULARY))
    table[..., 1] += end_bonus
    return table.astype(np.float32)


def search(table: np.ndarray, num_beams: int, length: int = LENGTH, trie=None):
    """`beam_search` with a cache of each slot's tokens, from which the lineage must rebuild each beam's past."""

    def next_logits(tokens, position, lineage, written):
        written = written.at[:, position].set(tokens)
        history = jnp.einsum("rknj,rnj->rkn", lineage.astype(jnp.int32), written)
        logits = jnp.asarray(table)[jnp.arange(len(table))[:, None], position, tokens]
        # The history enters, so that a wrong one changes the result.
        nudge = (history * jnp.arange(1, length + 1)).sum(-1, keepdims=True) % 5
        return logits + 0.1 * nudge * (jnp.arange(VOCABULARY) % 3), written

    def run():
        cache = jnp.zeros((len(table), length, num_beams), jnp.int32)
        return beam_search(next_logits, cache, len(table), num_beams, length, trie)

    return jax.tree.map(np.asarray, jax.jit(run)())


def begins(beginning: list[int], sequences: list[tuple[int, ...]]) -> bool:
    return any(list(sequence[: len(beginning)]) == beginning for sequence in sequences)


def by_hand(
    table: np.ndarray, num_beams: int, length: int = LENGTH, given: list[tuple[int, ...]] | None = None
) -> tuple[list[list[int]], list[float]]:
    """The rule, one row [position, token, next token] at a time; of `given` sequences alone, where there are any."""
    running, kept, done = [([0], 0.0)], [], False

    def offer(sequence, score):
        kept.append((sequence, score))
        kept.sort(key=lambda item: -item[1])
        del kept[num_beams:]

    for position in range(length):
        candidates = []
        for sequence, total in running:
            nudge = sum(token * (place + 1) for place, token in enumerate(sequence)) % 5
            logits = table[position, sequence[-1]] + np.float32(0.1) * nudge * (np.arange(VOCABULARY) % 3)
            log_probs = logits - np.log(np.exp(logits.astype(np.float64)).sum())
            words = [word for word in range(VOCABULARY) if given is None or begins([*sequence[1:], word], given)]
            candidates += [([*sequence, word], total + log_probs[word]) for word in words]
        if not candidates:
            return [item[0] for item in kept], [item[1] for item in kept]
        candidates.sort(key=lambda item: -item[1])
        candidates = candidates[: 2 * num_beams]
        for sequence, total in candidates[:num_beams]:
            if sequence[-1] == 1:
                offer(sequence, total / (position + 1))
        running = [item for item in candidates if item[0][-1] != 1][:num_beams]
        if len(kept) == num_beams and kept[-1][1] >= candidates[0][1] / (position + 1):
            done = True
            break
    if not done and given is None:
        for sequence, total in running:
            offer(sequence, total / (1 + length))
    return [item[0] for item in kept], [item[1] for item in kept]


@pytest.mark.parametrize("num_beams", [1, 2, 3, 4])
@pytest.mark.parametrize("end_bonus", [-8.0, 0.5, 2.5])  # no row ends; some do; most do
def test_rule(num_beams, end_bonus):
    table = tables(num_beams, end_bonus)
    tokens, scores = search(table, num_beams)
    ended = 0
    for row in range(ROWS):
        want, want_scores = by_hand(table[row], num_beams)
        padded = [sequence + [0] * (1 + LENGTH - len(sequence)) for sequence in want]
        np.testing.assert_array_equal(tokens[row], padded, err_msg=f"row {row}")
        np.testing.assert_allclose(scores[row], want_scores, atol=2e-6)
        ended += sum(1 in sequence for sequence in want)
    assert (ended > 0) == (end_bonus > -8)


@pytest.mark.parametrize("num_beams", [1, 3, 4])
@pytest.mark.parametrize("count", [1, 2, 5, 40])
def test_given_sequences(num_beams, count):
    """The rule again, among sequences of which some begin alike and some are the beginning of others."""
    random = np.random.default_rng(count)
    rests = [random.integers(2, 5, random.integers(1, LENGTH)).tolist() for _ in range(count)]
    given = sorted({(*rest, 1) for rest in rests})
    table = tables(count, 0.5)
    tokens, scores = search(table, num_beams, trie=make_trie(given))
    unlimited, missing = 0, 0
    for row in range(ROWS):
        want, want_scores = by_hand(table[row], num_beams, given=given)
        padded = [sequence + [0] * (1 + LENGTH - len(sequence)) for sequence in want]
        np.testing.assert_array_equal(tokens[row][: len(want)], padded, err_msg=f"row {row}")
        np.testing.assert_allclose(scores[row][: len(want)], want_scores, atol=2e-6)
        assert (scores[row][len(want) :] == -np.inf).all()
        assert all(tuple(sequence[1:]) in given for sequence in want)
        assert len(want) >= 1
        missing += num_beams - len(want)
        unlimited += want != by_hand(table[row], num_beams)[0]
    assert unlimited > ROWS / 2
    assert missing >= ROWS * max(0, num_beams - len(given))


def test_every_given_sequence_in_reach_has_the_score_it_has_without_the_others():
    given = [(2, 3, 1), (2, 1), (4, 1)]
    table = tables(5, 0.5)
    tokens, scores = search(table, 3, trie=make_trie(given))
    for sequence in given:
        alone, score = search(table, 1, trie=make_trie([sequence]))
        assert (alone[:, 0, 1 : 1 + len(sequence)] == sequence).all()
        for row in range(ROWS):
            found = [place for place in range(3) if tuple(tokens[row, place, 1 : 1 + len(sequence)]) == sequence]
            np.testing.assert_allclose(scores[row, found], score[row, 0], atol=2e-6)


def test_trie():
    trie = make_trie([(5, 7, 1), (5, 1), (4, 1), (5, 7, 1)])
    paths, edges = [], {}
    for node in range(len(trie.first) - 1):
        edges[node] = range(trie.first[node], trie.first[node + 1])
    nodes = [(0, ())]
    while nodes:
        node, path = nodes.pop()
        paths += [path] if not edges[node] else []
        nodes += [(edge + 1, (*path, int(trie.tokens[edge]))) for edge in edges[node]]
    assert sorted(paths) == [(4, 1), (5, 1), (5, 7, 1)]
    assert trie.widest == 2
    assert len(trie.tokens) == 8  # of six edges
    assert make_trie([(n, 1) for n in range(2, 7)]).widest == 8


def test_rows_do_not_meet():
    """A row that is done waits unchanged for the others, and alone it comes out the same."""
    table = tables(7, 1.5)
    table[0, :, :, 1] += 30  # done at once
    table[1, :, :, 1] -= 30  # runs to the last token
    together = search(table, 3)
    for row in (0, 1, 2):
        alone = search(table[row : row + 1], 3)
        for got, want in zip(alone, together, strict=True):
            np.testing.assert_array_equal(got[0], want[row])


def test_stops_when_all_rows_are_done():
    calls = []

    def next_logits(tokens, position, lineage, cache):
        jax.debug.callback(lambda p: calls.append(int(p)), position)
        logits = jnp.where(jnp.arange(VOCABULARY) == 1, 5.0, 0.0)
        return jnp.broadcast_to(logits, (*tokens.shape, VOCABULARY)), cache

    tokens, _ = jax.jit(lambda: beam_search(next_logits, (), 4, 1, 30))()
    jax.effects_barrier()
    assert calls == [0]
    np.testing.assert_array_equal(tokens[0, 0], [0, 1] + [0] * 29)


def test_lineage_has_one_slot_a_position():
    table, seen = tables(3, 0.5), []

    def next_logits(tokens, position, lineage, cache):
        past = (lineage.sum(-1) == (jnp.arange(LENGTH) <= position)).all()
        present = (lineage[:, :, position] == jnp.eye(3, dtype=bool)).all()
        jax.debug.callback(lambda ok: seen.append(bool(ok)), past & present)
        return jnp.asarray(table)[jnp.arange(ROWS)[:, None], position, tokens], cache

    jax.block_until_ready(jax.jit(lambda: beam_search(next_logits, (), ROWS, 3, LENGTH))())
    jax.effects_barrier()
    assert len(seen) > 1
    assert all(seen)


@pytest.mark.parametrize("vocabulary", [4, 50])  # fewer and more tokens than candidates
def test_two_stage_top_k_is_the_global_one(vocabulary):
    """With ties, of which the lower flat index comes first."""
    rng = np.random.default_rng(0)
    logits = rng.integers(0, 6, (40, 3, vocabulary)).astype(np.float32)
    before = np.repeat(rng.integers(-3, 0, (40, 1)), 3, axis=1).astype(np.float32)
    logits[::2] = logits[::2, :1]  # the same in all beams
    sums, parents, words = _best_continuations(jnp.asarray(before), jnp.asarray(logits), 6)
    totals = np.asarray(before[..., None] + jax.nn.log_softmax(logits)).reshape(40, -1)
    order = np.argsort(-totals, axis=1, kind="stable")[:, :6]
    np.testing.assert_array_equal(np.asarray(parents) * vocabulary + words, order)
    np.testing.assert_allclose(sums, np.take_along_axis(totals, order, axis=1), rtol=1e-6)
