"""Low-rank corrections of the language model's head and token embedding (paper section 3.5, appendix A.2).

Each adds scale · B·A, of rank r, to a large matrix that may itself be frozen. At the start one of A, B is zero, so
training begins at the matrix as it is. Both factors are stored transposed, ready to be multiplied from the right.

Method: docs/method.md#7-object-name-generator.
"""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int


class LoRAEmbedding(nn.Module):
    """Token embedding E[i] + scale·(B·A)[:, i]. `rank` 0 leaves the correction out."""

    vocab_size: int
    width: int
    rank: int
    scale: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, tokens: Int[Array, "*n"]) -> Float[Array, "*n E"]:
        table = self.param("embedding", nn.initializers.normal(1.0), (self.vocab_size, self.width))
        rows = jnp.take(table, tokens, axis=0, mode="clip")
        if self.rank:
            a = self.param("lora_A", nn.initializers.zeros, (self.vocab_size, self.rank))
            b = self.param("lora_B", nn.initializers.normal(1.0), (self.rank, self.width))
            rows = rows + self.scale * (jnp.take(a, tokens, axis=0, mode="clip") @ b)
        return rows.astype(self.dtype)


class LoRAHead(nn.Module):
    """Logits W·y + b + scale·(B·A)·y in float32. `rank` 0 leaves the correction out."""

    vocab_size: int
    width: int
    rank: int
    scale: float
    bias: bool
    dtype: jnp.dtype

    def setup(self):
        self.kernel = self.param("kernel", nn.initializers.normal(self.width**-0.5), (self.width, self.vocab_size))
        if self.bias:
            self.offset = self.param("bias", nn.initializers.zeros, (self.vocab_size,))
        if self.rank:
            # Kaiming uniform with a = √5: uniform in ±1/√E.
            kaiming = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
            self.lora_A = self.param("lora_A", kaiming, (self.width, self.rank))
            self.lora_B = self.param("lora_B", nn.initializers.zeros, (self.rank, self.vocab_size))

    def __call__(self, hidden: Float[Array, "*n E"]) -> Float[Array, "*n V"]:
        """Keeps the factors apart: the gradient then needs no V×E matrix for them."""
        logits = self._product(hidden, self.kernel)
        if self.rank:
            logits += self.scale * self._product(self._product(hidden, self.lora_A), self.lora_B)
        return logits + self.offset if self.bias else logits

    def merged(self) -> Float[Array, "E V"]:
        """W + scale·B·A as one matrix, for the many products of a beam search."""
        kernel = self.kernel
        if self.rank:
            kernel = kernel + self.scale * (self.lora_A @ self.lora_B)
        return kernel.astype(self.dtype)

    def apply_merged(self, hidden: Float[Array, "*n E"], kernel: Float[Array, "E V"]) -> Float[Array, "*n V"]:
        """The logits, given `merged()`."""
        logits = self._product(hidden, kernel)
        return logits + self.offset if self.bias else logits

    def _product(self, x: Float[Array, "*n a"], matrix: Float[Array, "a b"]) -> Float[Array, "*n b"]:
        return jnp.matmul(x.astype(self.dtype), matrix.astype(self.dtype), preferred_element_type=jnp.float32)
