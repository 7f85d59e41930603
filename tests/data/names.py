"""The names that rows of tokens spell."""

from opendet_jax.data.tokenizer import Tokenizer


def decode_names(tokenizer: Tokenizer, tokens) -> list[str]:
    return [tokenizer.decode(row) for row in tokens]
