"""The Object Name Generator (paper section 3.5): a VL-prompt goes into T5 as its only input position, a name comes out.

Letters: R rows (objects), T tokens of a name, K beams, E text width, V vocabulary.

Method: docs/method.md#7-object-name-generator.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from opendet_jax.config import Ablation, ModelConfig
from opendet_jax.model.beam_search import START, Trie, beam_search
from opendet_jax.model.t5 import T5
from opendet_jax.ops.chunks import live_chunks, pack

ROW_CHUNK, TOKEN_CHUNK = 32, 256  # of training: prompts that T5's encoder sees at once, tokens that its decoder does
PROMPT, ENCODER, DECODER = 0, 1, 2  # numbers of a row's keys; the token at position t has DECODER + t


@struct.dataclass
class Names:
    """Generated names, best first: token 0, the name, </s> = 1 if it ended, zeros."""

    tokens: Int[Array, "R K N1"]  # N1 = 1 + max_new_tokens
    scores: Float[Array, "R K"]  # mean log-probability, as beam_search.py has it; −∞: there is no such name


def normalise_prompts(prompts: Float[Array, "R E"]) -> Float[Array, "R E"]:
    """x / (|x| + 1e-6), as float32; |x| gets no gradient at 0, where it has none."""
    squares = jnp.square(prompts.astype(jnp.float32)).sum(-1, keepdims=True)
    norms = jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), 0.0)
    return prompts / (norms + 1e-6)


def _shifted(tokens: Int[Array, "R T"]) -> Int[Array, "R T"]:
    """What the decoder reads where it is to write `tokens`."""
    return jnp.pad(tokens[:, :-1], ((0, 0), (1, 0)), constant_values=START)


def _keys(words: UInt32[Array, "n 2"], number: int | Int[Array, "n"]) -> Key[Array, "n"]:
    """The keys with this number of the rows' keys, given as `jax.random.key_data`."""
    return jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(words), jnp.broadcast_to(number, len(words)))


class NameGenerator(nn.Module):
    """Prompts to names. `token_losses` trains it, `generate` uses it."""

    config: ModelConfig
    ablation: Ablation

    def setup(self):
        config = self.config
        self.t5 = T5(config.t5, config.text_width, self.ablation.lora_head, jnp.dtype(config.dtype))

    def token_losses(
        self,
        prompts: Float[Array, "R E"],
        tokens: Int[Array, "R T"],
        deterministic: bool,
        keys: Key[Array, "R"] | None = None,
    ) -> Float[Array, "R T"]:
        """Negative log-likelihood of each token of the names; 0 on padding.

        Prompts are normalised here. A name ends with </s> = 1 and is padded with 0; a row of padding only is no
        object, and its prompt influences nothing. The time is that of the real rows and tokens (ops/chunks.py).
        `keys`: each row's dropout (unless `deterministic`), so that it is the same whatever rows it is computed with;
        None: keys of the stream "dropout".
        """
        if self.is_initializing():
            self.teacher_forced_logits(prompts, tokens)
            return jnp.zeros(tokens.shape)
        real = tokens != START
        names = real.any(axis=1, keepdims=True)
        prompts = normalise_prompts(jnp.where(names, prompts.astype(jnp.float32), 0.0))
        words = None
        if not deterministic:
            keys = jax.random.split(self.make_rng("dropout"), len(prompts)) if keys is None else keys
            words = jax.random.key_data(keys)
            prompts = self._dropped_out(prompts, words)
        memory = self._memory(prompts, names, words)
        return jnp.where(real, self._losses(memory, tokens, words), 0.0)

    def _dropped_out(self, prompts: Float[Array, "R E"], words) -> Float[Array, "R E"]:
        stays = 1.0 - self.config.generator_dropout
        kept = jax.vmap(lambda key: jax.random.bernoulli(key, stays, prompts.shape[1:]))(_keys(words, PROMPT))
        return jnp.where(kept, prompts / stays, 0.0)

    def _memory(self, prompts: Float[Array, "R E"], names: Bool[Array, "R 1"], words) -> Float[Array, "R E"]:
        """T5's encoder, for the real rows; for others anything."""
        t5, variables = self.t5.unbind()  # a pure function, as a loop needs it
        packing = pack(names, min(ROW_CHUNK, len(names)))

        def encode(shared, chunk):
            params, prompts = shared
            row, words = chunk
            keys = None if words is None else _keys(words, ENCODER)[:, None]
            memory: Any = t5.apply({"params": params}, prompts[row][:, None], keys, method=T5.encode)
            return memory[:, 0]

        own = {"encoder": variables["params"]["encoder"]}
        row = packing.places.row
        chunks = (row, None if words is None else words[row])
        return packing.unpack(live_chunks(encode, (own, prompts), chunks, packing.live))[:, 0]

    def _losses(self, memory: Float[Array, "R E"], tokens: Int[Array, "R T"], words) -> Float[Array, "R T"]:
        """−log p of the real tokens; of others anything. The head, V wide, sees one chunk at a time."""
        t5, variables = self.t5.unbind()
        longest = tokens.shape[1]
        packing = pack(tokens != START, min(max(TOKEN_CHUNK, 2 * longest), tokens.size + longest))

        def losses(shared, chunk) -> Any:
            params, memory = shared
            places, inputs, targets, words = chunk
            keys = None if words is None else _keys(words, DECODER + places.position)

            def logits(t5: T5):
                return t5.head(t5.decode_packed(inputs, places, memory[places.row], longest, keys))

            scores: Any = t5.apply({"params": params}, method=logits)
            chosen = jnp.take_along_axis(scores, targets[:, None], axis=-1)[:, 0]
            return nn.logsumexp(scores, axis=-1) - chosen

        own = {name: variables["params"][name] for name in ("shared", "decoder", "lm_head")}
        row, position = packing.places.row, packing.places.position
        chunks = (
            packing.places,
            _shifted(tokens)[row, position],
            tokens[row, position],
            None if words is None else words[row],
        )
        return packing.unpack(live_chunks(losses, (own, memory), chunks, packing.live))

    def teacher_forced_logits(self, prompts: Float[Array, "R E"], tokens: Int[Array, "R T"]) -> Float[Array, "R T V"]:
        """Float32 logits of every token given the true ones before it, without dropout. Prompts enter as they are.

        The decoder's input is the name shifted by one, 0 in front; position t is seen if target t is real.
        """
        return self.t5.head(self.t5.decode(_shifted(tokens), self.t5.encode(prompts[:, None]), tokens != START))

    def generate(
        self, prompts: Float[Array, "R E"], num_beams: int, max_new_tokens: int, trie: Trie | None = None
    ) -> Names:
        """The `num_beams` best names of each prompt by beam search (1: greedy), of at most `max_new_tokens` tokens.

        `trie`: the names to choose from; None: every name.
        """
        if self.config.normalise_prompts_at_inference:
            prompts = normalise_prompts(prompts)
        memory = self.t5.encode(prompts[:, None])
        decoding, cache = self.t5.start(memory, num_beams, max_new_tokens)
        t5, variables = self.t5.unbind()  # a pure function, as a loop needs it

        def next_logits(tokens, position, lineage, cache):
            return t5.apply(variables, decoding, tokens, position, lineage, cache, method=T5.step)

        return Names(*beam_search(next_logits, cache, prompts.shape[0], num_beams, max_new_tokens, trie))
