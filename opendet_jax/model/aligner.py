"""Bidirectional vision–language alignment, BVLA-M (Eq. 2): query–text scores. Training learns by them; inference does
without, unless it is to choose among given names.

Method: docs/method.md#5-aligner.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from opendet_jax.config import ModelConfig
from opendet_jax.model.distiller import DistillerBlock
from opendet_jax.model.layers import Pyramid


def unit(x: Float[Array, "*n E"]) -> Float[Array, "*n E"]:
    """x / |x|; zeros stay zeros, with gradient zero."""
    square = jnp.square(x).sum(axis=-1, keepdims=True)
    return jnp.where(square > 0, x / jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)


class Aligner(nn.Module):
    """S = cos(h·W_v2l + b, T_e) + (h·W_q + b_q)·(T_e·W_l2v + b_l)ᵀ; the second term only if `l_to_v`.

    `plain`, as in GenerateU: the first term is (h·W_v2l + b)·T_e, and queries are not refined.
    """

    config: ModelConfig
    l_to_v: bool = True
    plain: bool = False

    def __call__(
        self,
        hidden: Float[Array, "B Q D"],
        texts: Float[Array, "B G E"],
        memory: Pyramid | None = None,
        boxes: Float[Array, "B Q 4"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "B Q G"]:
        """Logits of the alignment, float32, before the sigmoid.

        With `memory` (E_feat) and `boxes` the queries, unless `plain`, are first refined by a look at E_feat in those
        boxes; neither is gradient-stopped.
        """
        return self.cosine_and_score(hidden, texts, memory, boxes, deterministic)[1]

    @nn.compact
    def cosine_and_score(
        self,
        hidden: Float[Array, "B Q D"],
        texts: Float[Array, "B G E"],
        memory: Pyramid | None = None,
        boxes: Float[Array, "B Q 4"] | None = None,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "B Q G"], Float[Array, "B Q G"]]:
        """The cosine of the first term, and S."""
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        if memory is not None and boxes is not None and not self.plain:
            refine = DistillerBlock(config, name="refine")
            hidden = refine(hidden, boxes, memory, deterministic=deterministic)
        projected = nn.Dense(config.text_width, dtype=dtype, name="v_to_l")(hidden).astype(jnp.float32)
        cosine = jnp.einsum("bqe,bge->bqg", unit(projected), unit(texts))
        scores = jnp.einsum("bqe,bge->bqg", projected, unit(texts)) if self.plain else cosine
        if self.l_to_v:
            query = nn.Dense(config.width, dtype=dtype, name="query")(hidden)
            text = nn.Dense(config.width, dtype=dtype, name="l_to_v")(texts)
            scores += jnp.einsum("bqd,bgd->bqg", query, text, preferred_element_type=jnp.float32)
        return cosine, scores
