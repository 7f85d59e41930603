"""T5, the encoder–decoder language model that spells out names (paper section 3.5).

Modules and parameters are named as in Hugging Face's T5, so that its weights map one to one. Attention scores are not
scaled; norms are RMS norms before each layer; a bias by relative position, held by the first block, serves all blocks.

Letters: R rows (objects), P encoder positions, T tokens, C tokens of several names one after the other, K beams, N
generated tokens, H heads, E width, V vocabulary.

Method: docs/method.md#7-object-name-generator.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from opendet_jax.config import T5Config
from opendet_jax.model.lora import LoRAEmbedding, LoRAHead
from opendet_jax.model.t5_layers import (
    RMS_EPSILON,
    CrossAttentionLayer,
    Dropout,
    FeedForwardLayer,
    SelfAttentionLayer,
    dropped,
)
from opendet_jax.ops.chunks import Places

# Keys [R, H, d, NK] and values [R, H, NK, d] of each decoder block: as the products want them, and one array with every
# position of every beam. Any other shape is copied, several times a step, before it is multiplied.
Cache = tuple[tuple[Array, Array], ...]


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

    def __call__(
        self, x: Float[Array, "R T E"], bias, mask, memory, own: bool, dropout: Dropout | None
    ) -> Float[Array, "R T E"]:
        x = self.layer[0](x, bias, mask, dropout)
        if self.decoder:
            x = self.layer[1].own(x, memory, dropout) if own else self.layer[1](x, memory)
        return self.layer[-1](x, dropout)

    def step(
        self, x: Float[Array, "R K E"], position, visible, bias, cross, cache
    ) -> tuple[Float[Array, "R K E"], tuple[Array, Array]]:
        x, cache = self.layer[0].step(x, position, visible, bias, cache)
        return self.layer[2](x + cross), cache


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

    def position_bias(self, length: int) -> Float[Array, "H T T"]:
        return self.block[0].layer[0].SelfAttention.position_bias(length)

    def dropout(self, keys: Key[Array, "R T"] | None, position: Int[Array, "T"], longest: int) -> Dropout | None:
        """What dropout keeps of the tokens in all layers; None, where there is no dropout."""
        config = self.config
        if keys is None or not config.dropout:
            return None
        cross = config.num_heads + self.width
        block = config.num_heads * longest + self.width + (cross if self.decoder else 0) + config.ffn_width + self.width
        return Dropout(config.dropout, keys, 2 * self.width + config.num_layers * block, position, longest)

    def __call__(
        self,
        x: Float[Array, "R T E"],
        bias: Float[Array, "H T T"],
        mask: Bool[Array, "R T T"] | None,
        memory: Float[Array, "R P E"] | None,
        own: bool = False,
        dropout: Dropout | None = None,
    ) -> Float[Array, "R T E"]:
        """`own`: of the memory's positions, one a token, each token sees its own alone."""
        x = dropped(x.astype(self.dtype), dropout)
        for block in self.block:
            x = block(x, bias, mask, memory, own, dropout)
        return dropped(self.final_layer_norm(x), dropout)


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

    def encode(self, embeddings: Float[Array, "R P E"], keys: Key[Array, "R P"] | None = None) -> Float[Array, "R P E"]:
        """`keys` of the positions' dropout, which needs P = 1; None: no dropout."""
        length = embeddings.shape[1]
        dropout = self.encoder.dropout(keys, jnp.arange(length), length)
        return self.encoder(embeddings, self.encoder.position_bias(length), None, None, dropout=dropout)

    def decode(
        self, tokens: Int[Array, "R T"], memory: Float[Array, "R P E"], valid: Bool[Array, "R T"]
    ) -> Float[Array, "R T E"]:
        """Hidden states of all positions at once, each looking at the valid positions up to its own."""
        length = tokens.shape[1]
        causal = jnp.tril(jnp.ones((length, length), bool))
        bias = self.decoder.position_bias(length)
        return self.decoder(self.shared(tokens), bias, causal & valid[:, None, :], memory)

    def decode_packed(
        self,
        tokens: Int[Array, "C"],
        places: Places,
        memory: Float[Array, "C E"],
        longest: int,
        keys: Key[Array, "C"] | None,
    ) -> Float[Array, "C E"]:
        """`decode` of names of at most `longest` tokens, one after the other, as `places` says.

        memory: the single position (P = 1) that the encoder has for each token's name; keys: of the tokens' dropout,
        None: no dropout.
        """
        row, position = places.row, places.position
        sees = (row[:, None] == row) & (position[:, None] >= position) & places.real
        bias = self.decoder.position_bias(longest)[:, position[:, None], position]
        dropout = self.decoder.dropout(None if keys is None else keys[None], position, longest)
        return self.decoder(self.shared(tokens)[None], bias, sees[None], memory[None], own=True, dropout=dropout)[0]

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
        """Logits after one more token of each beam; `lineage` as in beam_search.py."""
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
