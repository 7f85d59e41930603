"""The Object Name Generator (paper section 3.5): a VL-prompt goes into T5 as its only input position, a name comes out.

Letters: R rows (objects), T tokens of a name, K beams, E text width, V vocabulary.

Method: docs/method.md#7-object-name-generator.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int, Key

from opendet_jax.config import Ablation, ModelConfig
from opendet_jax.model.beam_search import START, beam_search
from opendet_jax.model.t5 import T5
from opendet_jax.ops.chunks import real_token_losses

HEAD_CHUNK = 128  # tokens


@struct.dataclass
class Names:
    """Generated names, best first: token 0, the name, </s> = 1 if it ended, zeros."""

    tokens: Int[Array, "R K N1"]  # N1 = 1 + max_new_tokens
    scores: Float[Array, "R K"]  # mean log-probability, as beam_search.py has it


def normalise_prompts(prompts: Float[Array, "R E"]) -> Float[Array, "R E"]:
    """x / (|x| + 1e-6), as float32; |x| gets no gradient at 0, where it has none."""
    squares = jnp.square(prompts.astype(jnp.float32)).sum(-1, keepdims=True)
    norms = jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), 0.0)
    return prompts / (norms + 1e-6)


class NameGenerator(nn.Module):
    """Prompts to names. `token_losses` trains it, `generate` uses it."""

    config: ModelConfig
    ablation: Ablation

    def setup(self):
        config = self.config
        self.t5 = T5(config.t5, config.text_width, self.ablation.lora_head, jnp.dtype(config.dtype))
        self.dropout = nn.Dropout(config.generator_dropout)

    def token_losses(
        self,
        prompts: Float[Array, "R E"],
        tokens: Int[Array, "R T"],
        deterministic: bool,
        keys: Key[Array, "R"] | None = None,
    ) -> Float[Array, "R T"]:
        """Negative log-likelihood of each token of the names; 0 on padding.

        Prompts are normalised here. A name ends with </s> = 1 and is padded with 0; a row of padding only is no
        object, and its prompt influences nothing. `keys`: each row's dropout (unless `deterministic`), so that it is
        the same whatever rows it is computed with; None: keys of the stream "dropout".
        """
        real = tokens != START
        prompts = normalise_prompts(jnp.where(real.any(axis=1, keepdims=True), prompts, 0.0))
        if deterministic:
            hidden = self._hidden(prompts, tokens, True)
        else:
            keys = jax.random.split(self.make_rng("dropout"), len(prompts)) if keys is None else keys
            hidden = self._dropped_out(prompts, tokens, keys)
        if self.is_initializing():
            self.t5.head(hidden)
        return self._head_losses(hidden, tokens)

    def _dropped_out(
        self, prompts: Float[Array, "R E"], tokens: Int[Array, "R T"], keys: Key[Array, "R"]
    ) -> Float[Array, "R T E"]:
        """`_hidden` with dropout, row by row."""
        generator, variables = self.unbind()

        def one_row(prompt, tokens, key) -> Any:
            rngs = {"dropout": key}
            return generator.apply(variables, prompt[None], tokens[None], rngs=rngs, method=NameGenerator._with_dropout)

        return jax.vmap(one_row)(prompts, tokens, keys)[:, 0]

    def _with_dropout(self, prompts: Float[Array, "R E"], tokens: Int[Array, "R T"]) -> Float[Array, "R T E"]:
        return self._hidden(self.dropout(prompts, deterministic=False), tokens, False)

    def _head_losses(self, hidden: Float[Array, "R T E"], tokens: Int[Array, "R T"]) -> Float[Array, "R T"]:
        """−log p of each real token. Names are short: the head, V wide, sees the real tokens alone, chunk by chunk."""
        t5, variables = self.t5.unbind()  # a pure function, as a loop needs it

        def losses(variables, hidden, tokens, _):
            logits: Any = t5.apply(variables, hidden, method=T5.head)
            return nn.logsumexp(logits, axis=-1, keepdims=True) - jnp.take_along_axis(logits, tokens, axis=-1)

        flat = tokens.reshape(1, -1)
        found = real_token_losses(
            Partial(losses, variables),
            hidden.reshape(1, flat.size, -1),
            flat[..., None],
            flat != START,
            chunk=HEAD_CHUNK,
        )
        return found.reshape(tokens.shape)

    def teacher_forced_logits(
        self, prompts: Float[Array, "R E"], tokens: Int[Array, "R T"], deterministic: bool
    ) -> Float[Array, "R T V"]:
        """Float32 logits of every token given the true ones before it. Prompts enter as they are.

        The decoder's input is the name shifted by one, 0 in front; position t is seen if target t is real.
        """
        return self.t5.head(self._hidden(prompts, tokens, deterministic))

    def _hidden(
        self, prompts: Float[Array, "R E"], tokens: Int[Array, "R T"], deterministic: bool
    ) -> Float[Array, "R T E"]:
        memory = self.t5.encode(prompts[:, None], deterministic)
        shifted = jnp.pad(tokens[:, :-1], ((0, 0), (1, 0)), constant_values=START)
        return self.t5.decode(shifted, memory, tokens != START, deterministic)

    def generate(self, prompts: Float[Array, "R E"], num_beams: int, max_new_tokens: int) -> Names:
        """The `num_beams` best names of each prompt by beam search (1: greedy), of at most `max_new_tokens` tokens."""
        if self.config.normalise_prompts_at_inference:
            prompts = normalise_prompts(prompts)
        memory = self.t5.encode(prompts[:, None], True)
        decoding, cache = self.t5.start(memory, num_beams, max_new_tokens)
        t5, variables = self.t5.unbind()  # a pure function, as a loop needs it

        def next_logits(tokens, position, lineage, cache):
            return t5.apply(variables, decoding, tokens, position, lineage, cache, method=T5.step)

        return Names(*beam_search(next_logits, cache, prompts.shape[0], num_beams, max_new_tokens))
