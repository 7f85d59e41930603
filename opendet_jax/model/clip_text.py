"""CLIP's text tower (Radford et al., 2021): names to the text embeddings T_e of the paper's section 3.1.

A causal transformer of pre-norm blocks; the embedding is the state at the end token, normalised and projected to E.

Method: docs/method.md#5-aligner, docs/method.md#13-evaluation.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from opendet_jax.config import CLIPTextConfig
from opendet_jax.model.layers import LayerNorm


def activation(x: Float[Array, "*n C"], kind: Literal["quick_gelu", "gelu"]) -> Float[Array, "*n C"]:
    """OpenAI's models have x·σ(1.702 x), some later ones the exact GELU."""
    return x * nn.sigmoid(1.702 * x) if kind == "quick_gelu" else nn.gelu(x, approximate=False)


class CLIPTextLayer(nn.Module):
    config: CLIPTextConfig

    @nn.compact
    def __call__(self, x: Float[Array, "R T C"]) -> Float[Array, "R T C"]:
        config = self.config
        rows, length, width = x.shape
        y = LayerNorm(name="layer_norm1")(x)
        q, k, v = (
            nn.Dense(width, name=f"{name}_proj")(y).reshape(rows, length, config.num_heads, -1) for name in "qkv"
        )
        scores = jnp.einsum("rthd,rshd->rhts", q * q.shape[-1] ** -0.5, k)
        seen = jnp.tril(jnp.ones((length, length), bool))
        weights = nn.softmax(jnp.where(seen, scores, jnp.finfo(jnp.float32).min))
        mixed = jnp.einsum("rhts,rshd->rthd", weights, v).reshape(x.shape)
        x = x + nn.Dense(width, name="out_proj")(mixed)
        y = nn.Dense(config.ffn_width, name="fc1")(LayerNorm(name="layer_norm2")(x))
        return x + nn.Dense(width, name="fc2")(activation(y, config.activation))


class CLIPText(nn.Module):
    config: CLIPTextConfig

    @nn.compact
    def __call__(self, tokens: Int[Array, "R T"]) -> Float[Array, "R E"]:
        """Embeddings, not normalised, float32. T is at most `max_tokens`; what stands after a row's first end token
        does not matter."""
        config = self.config
        table = nn.Embed(config.vocab_size, config.width, name="token_embedding")
        positions = self.param("position_embedding", nn.initializers.normal(0.01), (config.max_tokens, config.width))
        x = table(tokens) + positions[: tokens.shape[1]]
        for layer in range(config.num_layers):
            x = CLIPTextLayer(config, name=f"layers_{layer}")(x)
        # Files older than the end token's number in the config say 2 and mean the largest token.
        marked = tokens if config.end_token == 2 else tokens == config.end_token
        end = jnp.argmax(marked, axis=1)
        pooled = jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0]
        pooled = LayerNorm(name="final_layer_norm")(pooled)
        return nn.Dense(config.text_width, use_bias=False, name="text_projection")(pooled)


def clip_text_shapes(config: CLIPTextConfig) -> dict:
    """The parameter tree, abstract."""
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    return jax.eval_shape(CLIPText(config).init, jax.random.key(0), tokens)["params"]
