"""Names by beam search at Flan-T5-base's size against transformers' T5ForConditionalGeneration.generate, same weights.

    python -m benchmarks.naming

First 300 prompts, 3 beams, exactly 30 tokens on both sides, and the same sequences. Then "as used": ours names the 100
boxes that are shown, whose names end within 6 tokens, beside the peer's 300 at 30.
"""

from dataclasses import replace
from functools import cache, partial

import numpy as np

from benchmarks.comparison import Case, Ours, Run, main
from benchmarks.multiply_adds import products
from benchmarks.sizes import compiled, converted

BEAMS, TOKENS, PROMPTS = 3, 30, 300
E, VOCABULARY = 768, 32128
USED_PROMPTS, USED_TOKENS = 100, 6


@cache
def peer_model():
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"d_model": E, "d_kv": 64, "d_ff": 2048, "num_layers": 12, "num_heads": 12, "vocab_size": VOCABULARY}
    config = T5Config(**sizes, feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config).eval()
    # Random logits are so far apart that probabilities round to 1 and beams to ties; these are as a trained model's.
    model.lm_head.weight.data.mul_(0.3)
    return model


def prompts() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((PROMPTS, 1, E), np.float32)


def ours(rows: int, name_length: int | None) -> Ours:
    """`name_length`: tokens after which every name ends; None: never."""
    import jax
    import jax.numpy as jnp

    from opendet_jax.config import EvalConfig, T5Config
    from opendet_jax.model.beam_search import END, beam_search
    from opendet_jax.model.t5 import T5

    t5, params = T5(T5Config(), E, lora=False, dtype=jnp.dtype("float32")), converted("t5", peer_model())

    def generate(params, chunk):
        variables = {"params": params}
        memory = t5.apply(variables, chunk, method=T5.encode)
        decoding, cache = t5.apply(variables, memory, BEAMS, TOKENS, method=T5.start)

        def next_logits(tokens, position, lineage, cache):
            logits, cache = t5.apply(variables, decoding, tokens, position, lineage, cache, method=T5.step)
            ending = -jnp.inf if name_length is None else jnp.where(position + 1 < name_length, -jnp.inf, 1e4)
            return logits.at[..., END].set(ending), cache

        return beam_search(next_logits, cache, chunk.shape[0], BEAMS, TOKENS)

    size = EvalConfig().naming_chunks[-1]
    chunk = prompts()[:size]
    _, seconds = compiled(generate, params, chunk)
    program = jax.jit(generate)
    params = jax.device_put(params)
    chunks = [prompts()[i : min(i + size, rows)] for i in range(0, rows, size)]
    chunks = [np.pad(c, ((0, size - len(c)), (0, 0), (0, 0)), mode="edge") for c in chunks]

    def run():
        sequences = [np.asarray(program(params, chunk)[0]) for chunk in chunks]
        return np.concatenate(sequences)[:rows]

    a_chunk = products(generate, params, chunk, rounds=name_length or TOKENS)
    work = [replace(product, times=product.times * rows / size) for product in a_chunk]
    return Ours(run, seconds, work)


def peer() -> Run:
    import torch

    x = torch.from_numpy(prompts())

    def run():
        with torch.no_grad():
            return peer_model().generate(
                inputs_embeds=x,
                attention_mask=torch.ones(PROMPTS, 1, dtype=torch.long),
                num_beams=BEAMS,
                num_return_sequences=BEAMS,
                min_new_tokens=TOKENS,
                max_new_tokens=TOKENS,
                length_penalty=1.0,
                do_sample=False,
            )

    return run


def same_sequences(mine: np.ndarray, theirs) -> None:
    """Token for token, of every beam; rounding may decide between equals in one of a hundred."""
    equal = (mine.reshape(PROMPTS * BEAMS, -1) == theirs.numpy()).all(axis=1)
    assert equal.mean() >= 0.99, f"{equal.sum()} of {len(equal)} sequences are the same"


CASES = (
    Case("naming 300 prompts, 3 beams, 30 tokens", partial(ours, PROMPTS, None), peer, same_sequences, least=1.2),
    Case("naming as used, against all at 30 tokens", partial(ours, USED_PROMPTS, USED_TOKENS), peer, least=12),
)

if __name__ == "__main__":
    main(__doc__, "benchmarks.naming", CASES)
