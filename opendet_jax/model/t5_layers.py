"""The layers of a T5 block: attention, feed-forward, their norms and their dropout.

Letters: R rows (objects), P encoder positions, T tokens, K beams, N generated tokens, H heads, E width.

Method: docs/method.md#7-object-name-generator.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int, Key

from opendet_jax.config import T5Config

RMS_EPSILON = 1e-6
MASKED = float(np.finfo(np.float32).min)  # finite: a row with every key masked stays a number


def relative_buckets(distance: np.ndarray, bidirectional: bool, buckets: int, max_distance: int) -> np.ndarray:
    """Bucket of each relative position (key − query): one per distance up close, logarithmic ones further away."""
    offset = np.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        offset = np.where(distance > 0, buckets, 0)
        distance = np.abs(distance)
    else:
        distance = np.maximum(-distance, 0)
    exact = buckets // 2
    octaves = np.log(np.maximum(distance, 1) / exact) / np.log(max_distance / exact)
    far = exact + (octaves * (buckets - exact)).astype(np.int64)
    return offset + np.where(distance < exact, distance, np.minimum(far, buckets - 1))


class Dropout:
    """Dropout as the tokens' own: what a token keeps in all the layers is drawn by its key, wherever it is computed.

    One draw serves every layer: each call takes the next numbers of every token. A draw has 16 bits, so that `rate` is
    met to 2⁻¹⁷.
    """

    def __init__(self, rate: float, keys: Key[Array, "R T"], numbers: int, position: Int[Array, "T"], longest: int):
        """`numbers` of a token in all layers; its `position` in its name, below `longest`."""

        def draw(key) -> Bool[Array, "n"]:
            words = jax.random.bits(key, (-(-numbers // 2),))  # of 32 bits, for two numbers each
            drawn = jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(-1)[:numbers]
            return drawn.astype(jnp.int32) < round((1.0 - rate) * 2**16)  # 2¹⁶ itself is none of 16 bits

        self._kept, self._taken, self._rate = jax.vmap(jax.vmap(draw))(keys), 0, rate
        self._position, self._longest = position, longest

    def numbers(self, x: Float[Array, "R T *n"]) -> Float[Array, "R T *n"]:
        return self._scaled(x, self._next(*x.shape[2:]))

    def heads(self, x: Float[Array, "R T inner"], heads: int) -> Float[Array, "R T inner"]:
        """A head's numbers stay or go together."""
        split = x.reshape(*x.shape[:2], heads, -1)
        return self._scaled(split, self._next(heads)[..., None]).reshape(x.shape)

    def weights(self, x: Float[Array, "R H T T"]) -> Float[Array, "R H T T"]:
        """A token chooses among the positions of its name, wherever their tokens stand."""
        kept = self._next(x.shape[1], self._longest)[..., self._position]
        return self._scaled(x, kept.swapaxes(1, 2))

    def _next(self, *shape: int) -> Bool[Array, "R T *shape"]:
        first, self._taken = self._taken, self._taken + math.prod(shape)
        assert self._taken <= self._kept.shape[-1]
        return self._kept[..., first : self._taken].reshape(*self._kept.shape[:2], *shape)

    def _scaled(self, x, kept):
        return jnp.where(kept, x / jnp.asarray(1.0 - self._rate, x.dtype), 0)


def dropped(x: Float[Array, "R T E"], dropout: Dropout | None) -> Float[Array, "R T E"]:
    return x if dropout is None else dropout.numbers(x)


class Attention(nn.Module):
    """Multi-head attention without scaling or biases; `relative` gives it the table of position biases."""

    config: T5Config
    width: int
    dtype: jnp.dtype
    relative: bool = False
    bidirectional: bool = False

    def setup(self):
        heads, inner = self.config.num_heads, self.config.num_heads * self.config.head_width

        def dense(features: int, std: float) -> nn.Dense:
            initial = nn.initializers.normal(std)
            return nn.Dense(features, use_bias=False, dtype=self.dtype, kernel_init=initial)

        # The missing 1/√d of the scores is in the initial scale of q.
        self.q = dense(inner, (self.width * self.config.head_width) ** -0.5)
        self.k = dense(inner, self.width**-0.5)
        self.v = dense(inner, self.width**-0.5)
        self.o = dense(self.width, inner**-0.5)
        if self.relative:
            initial = nn.initializers.normal(self.width**-0.5)
            self.relative_attention_bias = nn.Embed(self.config.relative_buckets, heads, embedding_init=initial)

    def position_bias(self, length: int) -> Float[Array, "H T T"]:
        """What the first block's table adds to the scores (query, key) of every block."""
        place = np.arange(length)
        buckets = relative_buckets(
            place[None, :] - place[:, None],
            self.bidirectional,
            self.config.relative_buckets,
            self.config.relative_max_distance,
        )
        return self.relative_attention_bias(jnp.asarray(buckets, jnp.int32)).transpose(2, 0, 1)

    def __call__(
        self,
        x: Float[Array, "R T E"],
        source: Float[Array, "R P E"],
        bias: Float[Array, "H T P"] | None,
        mask: Bool[Array, "R T P"] | None,
        dropout: Dropout | None = None,
    ) -> Float[Array, "R T E"]:
        if source.shape[1] == 1 and not self.is_initializing():
            # The softmax of a single number is 1: queries, keys and biases cannot matter.
            return jnp.broadcast_to(self.constant(source, dropout), x.shape)
        queries, keys, values = self._split(self.q(x)), self._split(self.k(source)), self._split(self.v(source))
        scores = jnp.einsum("rhtd,rhpd->rhtp", queries, keys, preferred_element_type=jnp.float32)
        if bias is not None:
            scores = scores + bias
        if mask is not None:
            scores = jnp.where(mask[:, None], scores, MASKED)
        weights = nn.softmax(scores).astype(self.dtype)
        if dropout is not None:
            weights = dropout.weights(weights)
        return self.o(self._join(jnp.einsum("rhtp,rhpd->rhtd", weights, values)))

    def constant(self, source: Float[Array, "R T E"], dropout: Dropout | None = None) -> Float[Array, "R T E"]:
        """Attention of each to a single position: W_o·W_v·source, whatever asks."""
        values = self.v(source)
        return self.o(values if dropout is None else dropout.heads(values, self.config.num_heads))

    def step(
        self,
        x: Float[Array, "R K E"],
        position: Int[Array, ""],
        visible: Bool[Array, "R K NK"],
        bias: Float[Array, "H 1 NK"],
        cache: tuple[Float[Array, "R H d NK"], Float[Array, "R H NK d"]],
    ) -> tuple[Float[Array, "R K E"], tuple[Float[Array, "R H d NK"], Float[Array, "R H NK d"]]]:
        """One token of each beam, written to the cache at `position`; `visible` picks the beam's own past from it."""
        place = position * x.shape[1]
        keys = jax.lax.dynamic_update_slice_in_dim(cache[0], self._split(self.k(x)).swapaxes(2, 3), place, axis=3)
        values = jax.lax.dynamic_update_slice_in_dim(cache[1], self._split(self.v(x)), place, axis=2)
        queries = self._split(self.q(x))
        scores = jnp.einsum("rhkd,rhdm->rhkm", queries, keys, preferred_element_type=jnp.float32)
        scores = jnp.where(visible[:, None], scores + bias, MASKED)
        weights = nn.softmax(scores).astype(self.dtype)
        mixed = jnp.einsum("rhkm,rhmd->rhkd", weights, values)
        return self.o(self._join(mixed)), (keys, values)

    def _split(self, x: Float[Array, "R T inner"]) -> Float[Array, "R H T d"]:
        return x.reshape(*x.shape[:2], self.config.num_heads, self.config.head_width).transpose(0, 2, 1, 3)

    def _join(self, x: Float[Array, "R H T d"]) -> Float[Array, "R T inner"]:
        return x.transpose(0, 2, 1, 3).reshape(x.shape[0], x.shape[2], -1)


class DenseReluDense(nn.Module):
    """The feed-forward layer: gated GELU (T5 1.1, Flan-T5), or a single ReLU layer as in the first T5."""

    config: T5Config
    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "R T E"], dropout: Dropout | None = None) -> Float[Array, "R T E"]:
        config = self.config

        def dense(features: int, name: str) -> nn.Dense:
            initial = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
            return nn.Dense(features, use_bias=False, dtype=self.dtype, kernel_init=initial, name=name)

        if config.gated:
            gate = nn.gelu(dense(config.ffn_width, "wi_0")(x), approximate=config.activation == "gelu_tanh")
            x = gate * dense(config.ffn_width, "wi_1")(x)
        else:
            x = nn.relu(dense(config.ffn_width, "wi")(x))
        return dense(self.width, "wo")(dropped(x, dropout))


class SelfAttentionLayer(nn.Module):
    config: T5Config
    width: int
    dtype: jnp.dtype
    relative: bool
    bidirectional: bool

    def setup(self):
        self.layer_norm = nn.RMSNorm(RMS_EPSILON, self.dtype)
        self.SelfAttention = Attention(self.config, self.width, self.dtype, self.relative, self.bidirectional)

    def __call__(self, x: Float[Array, "R T E"], bias, mask, dropout: Dropout | None) -> Float[Array, "R T E"]:
        y = self.layer_norm(x)
        return x + dropped(self.SelfAttention(y, y, bias, mask, dropout), dropout)

    def step(
        self, x: Float[Array, "R K E"], position, visible, bias, cache
    ) -> tuple[Float[Array, "R K E"], tuple[Array, Array]]:
        y, cache = self.SelfAttention.step(self.layer_norm(x), position, visible, bias, cache)
        return x + y, cache


class CrossAttentionLayer(nn.Module):
    config: T5Config
    width: int
    dtype: jnp.dtype

    def setup(self):
        self.layer_norm = nn.RMSNorm(RMS_EPSILON, self.dtype)
        self.EncDecAttention = Attention(self.config, self.width, self.dtype)

    def __call__(self, x: Float[Array, "R T E"], memory: Float[Array, "R P E"]) -> Float[Array, "R T E"]:
        return x + self.EncDecAttention(self.layer_norm(x), memory, None, None)

    def own(
        self, x: Float[Array, "R T E"], memory: Float[Array, "R T E"], dropout: Dropout | None
    ) -> Float[Array, "R T E"]:
        """Each token attends to a single position, its own."""
        return x + dropped(self.EncDecAttention.constant(memory, dropout), dropout)


class FeedForwardLayer(nn.Module):
    config: T5Config
    width: int
    dtype: jnp.dtype

    def setup(self):
        self.layer_norm = nn.RMSNorm(RMS_EPSILON, self.dtype)
        self.DenseReluDense = DenseReluDense(self.config, self.width, self.dtype)

    def __call__(self, x: Float[Array, "R T E"], dropout: Dropout | None = None) -> Float[Array, "R T E"]:
        return x + dropped(self.DenseReluDense(self.layer_norm(x), dropout), dropout)
