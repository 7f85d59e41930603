"""T5, the encoder–decoder language model that spells out names (paper section 3.5).

Modules and parameters are named as in Hugging Face's T5, so that its weights map one to one. Attention scores are not
scaled; norms are RMS norms before each layer; a bias by relative position, held by the first block, serves all blocks.

Letters: R rows (objects), P encoder positions, T tokens, K beams, N generated tokens, H heads, E width, V vocabulary.

Method: docs/method.md#7-object-name-generator.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from opendet_jax.config import T5Config
from opendet_jax.model.lora import LoRAEmbedding, LoRAHead

RMS_EPSILON = 1e-6
MASKED = float(np.finfo(np.float32).min)  # finite: a row with every key masked stays a number
# Keys [R, H, d, NK] and values [R, H, NK, d] of each decoder block: as the products want them, and one array with every
# position of every beam. Any other shape is copied, several times a step, before it is multiplied.
Cache = tuple[tuple[Array, Array], ...]


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
        self.dropout = nn.Dropout(self.config.dropout)

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
        deterministic: bool,
    ) -> Float[Array, "R T E"]:
        values = self._split(self.v(source))
        if source.shape[1] == 1 and not self.is_initializing():
            # The softmax of a single number is 1: queries, keys and biases cannot matter.
            if deterministic:
                return jnp.broadcast_to(self.constant(source), x.shape)
            weights = jnp.ones((x.shape[0], self.config.num_heads, x.shape[1], 1), self.dtype)
        else:
            queries, keys = self._split(self.q(x)), self._split(self.k(source))
            scores = jnp.einsum("rhtd,rhpd->rhtp", queries, keys, preferred_element_type=jnp.float32)
            if bias is not None:
                scores = scores + bias
            if mask is not None:
                scores = jnp.where(mask[:, None], scores, MASKED)
            weights = nn.softmax(scores).astype(self.dtype)
        weights = self.dropout(weights, deterministic=deterministic)
        return self.o(self._join(jnp.einsum("rhtp,rhpd->rhtd", weights, values)))

    def constant(self, source: Float[Array, "R 1 E"]) -> Float[Array, "R 1 E"]:
        """Attention to a single position: W_o·W_v·source, whatever asks."""
        return self.o(self.v(source))

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
    def __call__(self, x: Float[Array, "*n E"], deterministic: bool) -> Float[Array, "*n E"]:
        config = self.config

        def dense(features: int, name: str) -> nn.Dense:
            initial = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
            return nn.Dense(features, use_bias=False, dtype=self.dtype, kernel_init=initial, name=name)

        if config.gated:
            gate = nn.gelu(dense(config.ffn_width, "wi_0")(x), approximate=config.activation == "gelu_tanh")
            x = gate * dense(config.ffn_width, "wi_1")(x)
        else:
            x = nn.relu(dense(config.ffn_width, "wi")(x))
        x = nn.Dropout(config.dropout)(x, deterministic=deterministic)
        return dense(self.width, "wo")(x)


class SelfAttentionLayer(nn.Module):
    config: T5Config
    width: int
    dtype: jnp.dtype
    relative: bool
    bidirectional: bool

    def setup(self):
        self.layer_norm = nn.RMSNorm(RMS_EPSILON, self.dtype)
        self.SelfAttention = Attention(self.config, self.width, self.dtype, self.relative, self.bidirectional)
        self.dropout = nn.Dropout(self.config.dropout)

    def __call__(self, x: Float[Array, "R T E"], bias, mask, deterministic: bool) -> Float[Array, "R T E"]:
        y = self.layer_norm(x)
        return x + self.dropout(self.SelfAttention(y, y, bias, mask, deterministic), deterministic=deterministic)

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
        self.dropout = nn.Dropout(self.config.dropout)

    def __call__(self, x: Float[Array, "R T E"], memory, deterministic: bool) -> Float[Array, "R T E"]:
        y = self.EncDecAttention(self.layer_norm(x), memory, None, None, deterministic)
        return x + self.dropout(y, deterministic=deterministic)


class FeedForwardLayer(nn.Module):
    config: T5Config
    width: int
    dtype: jnp.dtype

    def setup(self):
        self.layer_norm = nn.RMSNorm(RMS_EPSILON, self.dtype)
        self.DenseReluDense = DenseReluDense(self.config, self.width, self.dtype)
        self.dropout = nn.Dropout(self.config.dropout)

    def __call__(self, x: Float[Array, "R T E"], deterministic: bool) -> Float[Array, "R T E"]:
        y = self.DenseReluDense(self.layer_norm(x), deterministic)
        return x + self.dropout(y, deterministic=deterministic)


class Block(nn.Module):
    """Self-attention, in the decoder cross-attention, feed-forward."""

    config: T5Config
    width: int
    dtype: jnp.dtype
    decoder: bool
    first: bool  # holds the table of position biases

    def setup(self):
        parts = (self.config, self.width, self.dtype)
        cross = [CrossAttentionLayer(*parts)] if self.decoder else []
        attention = SelfAttentionLayer(*parts, relative=self.first, bidirectional=not self.decoder)
        self.layer = [attention, *cross, FeedForwardLayer(*parts)]

    def __call__(self, x: Float[Array, "R T E"], bias, mask, memory, deterministic: bool) -> Float[Array, "R T E"]:
        x = self.layer[0](x, bias, mask, deterministic)
        if self.decoder:
            x = self.layer[1](x, memory, deterministic)
        return self.layer[-1](x, deterministic)

    def step(
        self, x: Float[Array, "R K E"], position, visible, bias, cross, cache
    ) -> tuple[Float[Array, "R K E"], tuple[Array, Array]]:
        x, cache = self.layer[0].step(x, position, visible, bias, cache)
        return self.layer[2](x + cross, True), cache


class Stack(nn.Module):
    """The encoder, or the decoder."""

    config: T5Config
    width: int
    dtype: jnp.dtype
    decoder: bool

    def setup(self):
        self.block = [
            Block(self.config, self.width, self.dtype, self.decoder, first=i == 0)
            for i in range(self.config.num_layers)
        ]
        self.final_layer_norm = nn.RMSNorm(RMS_EPSILON, self.dtype)
        self.dropout = nn.Dropout(self.config.dropout)

    def position_bias(self, length: int) -> Float[Array, "H T T"]:
        return self.block[0].layer[0].SelfAttention.position_bias(length)

    def __call__(self, x: Float[Array, "R T E"], mask, memory, deterministic: bool) -> Float[Array, "R T E"]:
        bias = self.position_bias(x.shape[1])
        x = self.dropout(x.astype(self.dtype), deterministic=deterministic)
        for block in self.block:
            x = block(x, bias, mask, memory, deterministic)
        return self.dropout(self.final_layer_norm(x), deterministic=deterministic)


@struct.dataclass
class Decoding:
    """What every step of a generation shares, computed once for it."""

    cross: tuple[Array, ...]  # of each block, what cross-attention adds: [R, 1, E]
    bias: Float[Array, "H N N"]
    head: Float[Array, "E V"]  # LoRA merged in


class T5(nn.Module):
    """Encoder, decoder, token embedding and head; `lora` gives the last two their low-rank corrections."""

    config: T5Config
    width: int
    lora: bool
    dtype: jnp.dtype

    def setup(self):
        config, rank = self.config, self.config.lora_rank if self.lora else 0
        sizes = (config.vocab_size, self.width, rank, config.lora_scale)
        self.shared = LoRAEmbedding(*sizes, dtype=self.dtype)
        self.encoder = Stack(config, self.width, self.dtype, decoder=False)
        self.decoder = Stack(config, self.width, self.dtype, decoder=True)
        self.lm_head = LoRAHead(*sizes, bias=config.head_bias, dtype=self.dtype)

    def encode(self, embeddings: Float[Array, "R P E"], deterministic: bool) -> Float[Array, "R P E"]:
        return self.encoder(embeddings, None, None, deterministic)

    def decode(
        self,
        tokens: Int[Array, "R T"],
        memory: Float[Array, "R P E"],
        valid: Bool[Array, "R T"],
        deterministic: bool,
    ) -> Float[Array, "R T E"]:
        """Hidden states of all positions at once, each looking at the valid positions up to its own."""
        length = tokens.shape[1]
        causal = jnp.tril(jnp.ones((length, length), bool))
        return self.decoder(self.shared(tokens), causal & valid[:, None, :], memory, deterministic)

    def head(self, hidden: Float[Array, "*n E"]) -> Float[Array, "*n V"]:
        """Float32 logits. The head is not tied to the embedding, so there is no factor d^-½."""
        return self.lm_head(hidden)

    def start(self, memory: Float[Array, "R 1 E"], num_beams: int, length: int) -> tuple[Decoding, Cache]:
        """Constants and the empty cache for `length` calls of `step`."""
        cross = tuple(block.layer[1].EncDecAttention.constant(memory) for block in self.decoder.block)
        heads, past = (memory.shape[0], self.config.num_heads), length * num_beams
        keys = jnp.zeros((*heads, self.config.head_width, past), self.dtype)
        values = jnp.zeros((*heads, past, self.config.head_width), self.dtype)
        cache = tuple((keys, values) for _ in self.decoder.block)
        return Decoding(cross, self.decoder.position_bias(length), self.lm_head.merged()), cache

    def step(
        self,
        decoding: Decoding,
        tokens: Int[Array, "R K"],
        position: Int[Array, ""],
        lineage: Bool[Array, "R K N K"],
        cache: Cache,
    ) -> tuple[Float[Array, "R K V"], Cache]:
        """Logits after one more token of each beam, without dropout; `lineage` as in beam_search.py."""
        rows, beams, length, _ = lineage.shape
        bias = jax.lax.dynamic_index_in_dim(decoding.bias, position, axis=1)
        bias = jnp.repeat(bias, beams, axis=2)
        visible = lineage.reshape(rows, beams, length * beams)
        x, new = self.shared(tokens), []
        for block, cross, old in zip(self.decoder.block, decoding.cross, cache, strict=True):
            x, updated = block.step(x, position, visible, bias, cross, old)
            new.append(updated)
        hidden = self.decoder.final_layer_norm(x)
        return self.lm_head.apply_merged(hidden, decoding.head), tuple(new)
