"""Beam search with length penalty 1, for any model that scores the next token.

The beams' past is not copied when beams are re-ordered: each beam writes its keys and values to its own slot of the
cache, and `lineage` says which slots hold its history.

What may be generated can be limited to given sequences, as a `Trie`.

Letters: R rows (objects), K beams, N generated tokens, V vocabulary.

Method: docs/method.md#beam-search.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Bool, Float, Int

START = 0  # also the padding
END = 1

# (tokens [R, K], position, lineage [R, K, N, K], cache) → (logits [R, K, V], cache). lineage[r, k, n, j] is True where
# the token that slot j held at position n belongs to beam k, its current token included.
NextLogits = Callable[[Array, Array, Array, Any], tuple[Array, Any]]


@struct.dataclass
class Trie:
    """Sequences that may be generated, as a tree: 0 is the root, e + 1 the node that edge e leads to.

    Nodes are numbered level by level, so that the edges of a node lie side by side.
    """

    first: Int[Array | np.ndarray, "nodes"]  # edge of each node; where the next node's begin, its own end
    tokens: Int[Array | np.ndarray, "edges"]
    widest: int = struct.field(pytree_node=False)  # edges of a node that are looked at, all of them


def make_trie(sequences: Sequence[Sequence[int]]) -> Trie:
    """Of sequences that end in </s>. Sizes are rounded up to powers of two, so that few programs serve all tries."""
    first, tokens = [], []
    nodes = deque([sorted(set(map(tuple, sequences)))])  # of each the rests of the sequences that pass it
    while nodes:
        rests = nodes.popleft()
        first.append(len(tokens))
        for token in dict.fromkeys(rest[0] for rest in rests):
            tokens.append(token)
            nodes.append([rest[1:] for rest in rests if rest[0] == token and len(rest) > 1])
    widest = int(np.diff([*first, len(tokens)]).max())
    padded = np.zeros(_power_of_two(len(tokens)), np.int32)
    padded[: len(tokens)] = tokens
    ends = np.full(len(padded) + 2 - len(first), len(tokens))
    return Trie(np.array([*first, *ends], np.int32), padded, _power_of_two(widest))


def _power_of_two(number: int) -> int:
    """The least that is as large."""
    return 1 << max(number - 1, 1).bit_length()


@struct.dataclass
class Beams:
    """State of the search. A hypothesis that does not exist yet has score −∞."""

    position: Int[Array, ""]
    tokens: Int[Array, "R K N1"]  # running beams, N1 = 1 + N
    sums: Float[Array, "R K"]  # of their log-probabilities; −∞: there is no such beam
    nodes: Int[Array, "R K"]  # of the trie, if there is one
    lineage: Bool[Array, "R K N K"]
    ended: Int[Array, "R K N1"]  # hypotheses, best first
    scores: Float[Array, "R K"]
    done: Bool[Array, "R"]
    cache: Any


def beam_search(
    next_logits: NextLogits, cache: Any, rows: int, num_beams: int, max_new_tokens: int, trie: Trie | None = None
) -> tuple[Int[Array, "R K N1"], Float[Array, "R K"]]:
    """The `num_beams` best sequences found for each row, best first, and their scores. One beam is greedy search.

    Sequences start with 0, hold </s> = 1 if they ended, then 0. The score is the sum of log-probabilities, that of
    </s> included, over the number of tokens before </s>, the start token counted.

    `trie`: only its sequences are generated, of those that fit; their scores are what they are without it. Of fewer
    than `num_beams` the others have score −∞.
    """
    shape = (rows, num_beams)
    start = Beams(
        position=jnp.zeros((), jnp.int32),
        tokens=jnp.full((*shape, 1 + max_new_tokens), START, jnp.int32),
        sums=jnp.full(shape, -jnp.inf).at[:, 0].set(0.0),  # all beams are equal at first: only one may go on
        nodes=jnp.zeros(shape, jnp.int32),
        lineage=jnp.zeros((*shape, max_new_tokens, num_beams), bool),
        ended=jnp.zeros((*shape, 1 + max_new_tokens), jnp.int32),
        scores=jnp.full(shape, -jnp.inf),
        done=jnp.zeros(rows, bool),
        cache=cache,
    )

    def unfinished(beams: Beams) -> Bool[Array, ""]:
        return (beams.position < max_new_tokens) & ~beams.done.all()

    last = jax.lax.while_loop(unfinished, lambda beams: _advance(next_logits, trie, beams), start)
    # Out of tokens: what still runs competes as it is; the beginning of a given sequence is none.
    cut = last.done[:, None] | (trie is not None)
    offers = jnp.where(cut, -jnp.inf, last.sums / (1 + max_new_tokens))
    return _keep_best(last.ended, last.scores, last.tokens, offers)


def _advance(next_logits: NextLogits, trie: Trie | None, beams: Beams) -> Beams:
    """One token more."""
    num_beams, length = beams.tokens.shape[1], beams.position + 1
    here = jnp.arange(beams.lineage.shape[2]) == beams.position
    own = jnp.eye(num_beams, dtype=bool)[:, None, :] & here[None, :, None]
    lineage = beams.lineage | own
    current = jax.lax.dynamic_index_in_dim(beams.tokens, beams.position, axis=2, keepdims=False)
    logits, cache = next_logits(current, beams.position, lineage, beams.cache)

    logits = logits.astype(jnp.float32)
    if trie is None:
        sums, parents, words = _best_continuations(beams.sums, logits, 2 * num_beams)
        nodes = jnp.zeros_like(words)
    else:
        sums, parents, nodes = _best_edges(beams.sums, logits, beams.nodes, trie, 2 * num_beams)
        words = jnp.where(sums > -jnp.inf, jnp.asarray(trie.tokens)[nodes - 1], START)
    tokens = jnp.take_along_axis(beams.tokens, parents[..., None], axis=1)
    tokens = jax.lax.dynamic_update_index_in_dim(tokens, words, length, axis=2)

    # Continuations that end become hypotheses, but only those among the first K.
    ends = words == END
    offers = jnp.where(ends & (jnp.arange(2 * num_beams) < num_beams), sums / length, -jnp.inf)
    frozen = beams.done[:, None]
    ended, scores = _keep_best(beams.ended, beams.scores, tokens, jnp.where(frozen, -jnp.inf, offers))
    # Done once K are kept and no running sum, taken over the present length, beats the worst of them; or none runs.
    worst = scores[:, -1]
    done = beams.done | ((worst > -jnp.inf) & (worst >= sums[:, 0] / length)) | (sums[:, 0] == -jnp.inf)

    # The others run on: at most one continuation of each beam ends, so at least K of the 2K do not.
    runs = jnp.argsort(ends, axis=1, stable=True)[:, :num_beams]
    parents = jnp.take_along_axis(parents, runs, axis=1)
    return Beams(
        position=length,
        tokens=jnp.take_along_axis(tokens, runs[..., None], axis=1),
        sums=jnp.take_along_axis(sums, runs, axis=1),
        nodes=jnp.take_along_axis(nodes, runs, axis=1),
        lineage=jnp.take_along_axis(lineage, parents[..., None, None], axis=1),
        ended=ended,
        scores=scores,
        done=done,
        cache=cache,
    )


def _best_continuations(
    sums: Float[Array, "R K"], logits: Float[Array, "R K V"], count: int
) -> tuple[Float[Array, "R C"], Int[Array, "R C"], Int[Array, "R C"]]:
    """The `count` largest of a row's K·V sums of log-probabilities, with beam and token.

    Two stages, each beam's best first: a beam's tokens are in the order of their logits, so only its best need
    log-probabilities, and the others enter their normaliser alone. Of equals, both prefer the lower index.
    """
    rows, num_beams, vocab_size = logits.shape
    each = min(count, vocab_size)
    best, words = jax.lax.top_k(logits.reshape(rows * num_beams, vocab_size), each)
    best = best.reshape(rows, num_beams, each)
    largest = best[..., :1]
    normaliser = jnp.log(jnp.exp(logits - largest).sum(-1, keepdims=True))  # log-sum-exp, less the largest
    totals = sums[..., None] + (best - largest - normaliser)
    sums, index = jax.lax.top_k(totals.reshape(rows, num_beams * each), count)
    words = jnp.take_along_axis(words.reshape(rows, num_beams * each), index, axis=1)
    return sums, index // each, words


def _best_edges(
    sums: Float[Array, "R K"], logits: Float[Array, "R K V"], nodes: Int[Array, "R K"], trie: Trie, count: int
) -> tuple[Float[Array, "R C"], Int[Array, "R C"], Int[Array, "R C"]]:
    """The same among the edges of the beams' nodes: sums, beams, and the nodes that the edges lead to.

    Where there are fewer, the sums of the others are −∞.
    """
    first, tokens = jnp.asarray(trie.first), jnp.asarray(trie.tokens)
    each = max(trie.widest, -(-count // sums.shape[1]))
    edges = first[nodes][..., None] + jnp.arange(each)
    real = edges < first[nodes + 1][..., None]
    edges = jnp.where(real, edges, 0)
    log_probabilities = jnp.take_along_axis(logits, tokens[edges], axis=-1) - nn.logsumexp(logits, -1, keepdims=True)
    totals = sums[..., None] + jnp.where(real, log_probabilities, -jnp.inf)
    sums, index = jax.lax.top_k(totals.reshape(len(sums), -1), count)
    nodes = 1 + jnp.take_along_axis(edges.reshape(len(sums), -1), index, axis=1)
    return sums, index // each, nodes


def _keep_best(
    ended: Int[Array, "R K N1"],
    scores: Float[Array, "R K"],
    tokens: Int[Array, "R C N1"],
    offers: Float[Array, "R C"],
) -> tuple[Int[Array, "R K N1"], Float[Array, "R K"]]:
    """The K best of the hypotheses and what is offered, best first; of equals the older."""
    scores, index = jax.lax.top_k(jnp.concatenate([scores, offers], axis=1), scores.shape[1])
    return jnp.take_along_axis(jnp.concatenate([ended, tokens], axis=1), index[..., None], axis=1), scores
