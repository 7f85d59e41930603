"""Swin Transformer (Liu et al., 2021): attention in windows that shift by half a window every second block.

Modules are named as in the authors' checkpoints. Maps are [B, h, w, C]; any size works: maps are padded to whole
windows (with zeros, after the norm) and to even sides before merging.

Method: docs/method.md#2-backbone-neck-encoder.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from opendet_jax.config import SwinConfig
from opendet_jax.model.layers import LayerNorm, Remat, recomputed

PATCH = 4  # pixels a side
MASKED = -100.0  # added to the logits of pairs from different parts of the image
Dense = partial(nn.Dense, kernel_init=nn.initializers.truncated_normal(0.02))


def pad_to_multiple(x: Float[Array, "B h w C"], multiple: int) -> Float[Array, "B H W C"]:
    """Zeros on the right and below."""
    bottom, right = -x.shape[1] % multiple, -x.shape[2] % multiple
    return jnp.pad(x, ((0, 0), (0, bottom), (0, right), (0, 0))) if bottom or right else x


def to_windows(x: Float[Array, "B h w C"], window: int) -> Float[Array, "R N C"]:
    """R = B · windows (row by row), N = window² positions (row by row)."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // window, window, width // window, window, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, window * window, channels)


def from_windows(x: Float[Array, "R N C"], window: int, height: int, width: int) -> Float[Array, "B h w C"]:
    x = x.reshape(-1, height // window, width // window, window, window, x.shape[-1])
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, height, width, x.shape[-1])


def relative_position_index(window: int) -> Int[np.ndarray, "N N"]:
    """Row of the bias table for each pair of positions: (Δy + w − 1)(2w − 1) + Δx + w − 1."""
    y, x = np.divmod(np.arange(window * window), window)
    return (y[:, None] - y + window - 1) * (2 * window - 1) + x[:, None] - x + window - 1


def shifted_regions(height: int, width: int, window: int, shift: int) -> Int[np.ndarray, "W N"]:
    """Which part of the image each position of a shifted map shows, window by window.

    Rolling brings opposite borders into one window; only positions of the same part may attend to each other.
    """

    def parts(size: int) -> np.ndarray:
        i = np.arange(size)
        return (i >= size - window).astype(np.int32) + (i >= size - shift)

    regions = 3 * parts(height)[:, None] + parts(width)
    regions = regions.reshape(height // window, window, width // window, window)
    return regions.transpose(0, 2, 1, 3).reshape(-1, window * window)


class WindowAttention(nn.Module):
    num_heads: int
    window: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "R N C"], regions: Int[np.ndarray, "W N"] | None) -> Float[Array, "R N C"]:
        rows, positions, channels = x.shape
        head_width = channels // self.num_heads
        qkv = Dense(3 * channels, dtype=self.dtype, name="qkv")(x.reshape(-1, channels))
        qkv = qkv.reshape(rows, positions, 3, self.num_heads, head_width).transpose(2, 0, 3, 1, 4)
        query, key, value = qkv[0] * head_width**-0.5, qkv[1], qkv[2]

        table = self.param(
            "relative_position_bias_table",
            nn.initializers.truncated_normal(0.02),
            ((2 * self.window - 1) ** 2, self.num_heads),
        )
        bias = table[relative_position_index(self.window)].transpose(2, 0, 1)
        logits = (query @ key.swapaxes(-1, -2)).astype(jnp.float32) + bias
        if regions is not None:
            apart = jnp.asarray(regions[:, :, None] != regions[:, None, :])
            mask = jnp.where(apart, MASKED, 0.0)[:, None]
            logits = (logits.reshape(-1, *mask.shape[:1], *logits.shape[1:]) + mask).reshape(logits.shape)
        out = nn.softmax(logits).astype(self.dtype) @ value
        out = out.transpose(0, 2, 1, 3).reshape(-1, channels)
        return Dense(channels, dtype=self.dtype, name="proj")(out).reshape(x.shape)


@jax.custom_vjp
def gelu(x: Float[Array, "*n C"]) -> Float[Array, "*n C"]:
    """x Φ(x) by erf, as PyTorch has it: erfc, which JAX's own takes, costs 2.5 times as much.

    In float32: 1 + erf(x) has few digits left where Φ is small. The backward pass reads x alone: erf again costs less
    than all that JAX keeps for it.
    """
    wide = x.astype(jnp.float32)
    return (wide * _normal_cdf(wide)).astype(x.dtype)


def _normal_cdf(x: Float[Array, "*n C"]) -> Float[Array, "*n C"]:
    return 0.5 * (1 + jax.lax.erf(x * math.sqrt(0.5)))


def _gelu_backward(x: Float[Array, "*n C"], cotangent: Float[Array, "*n C"]) -> tuple[Float[Array, "*n C"]]:
    """Φ(x) + x φ(x)."""
    wide = x.astype(jnp.float32)
    density = jnp.exp(-0.5 * jnp.square(wide)) / math.sqrt(2 * math.pi)
    return ((cotangent * (_normal_cdf(wide) + wide * density)).astype(x.dtype),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


class SwinMLP(nn.Module):
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*n C"]) -> Float[Array, "*n C"]:
        hidden = gelu(Dense(4 * x.shape[-1], dtype=self.dtype, name="fc1")(x))
        return Dense(x.shape[-1], dtype=self.dtype, name="fc2")(hidden)


class SwinBlock(nn.Module):
    num_heads: int
    window: int
    shift: int  # 0 or half a window
    drop_path: float
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B h w C"], deterministic: bool = True) -> Float[Array, "B h w C"]:
        _, height, width, _ = x.shape
        # Stochastic depth: a whole branch of a sample is dropped.
        drop_path = nn.Dropout(self.drop_path, broadcast_dims=(1, 2, 3), name="drop_path")

        y = pad_to_multiple(LayerNorm(self.dtype, name="norm1")(x), self.window)
        padded_height, padded_width = y.shape[1:3]
        regions = None
        if self.shift:
            y = jnp.roll(y, (-self.shift, -self.shift), (1, 2))
            regions = shifted_regions(padded_height, padded_width, self.window, self.shift)
        attention = WindowAttention(self.num_heads, self.window, self.dtype, name="attn")
        y = attention(to_windows(y, self.window), regions)
        y = from_windows(y, self.window, padded_height, padded_width)
        if self.shift:
            y = jnp.roll(y, (self.shift, self.shift), (1, 2))
        x = x + drop_path(y[:, :height, :width], deterministic=deterministic)

        y = SwinMLP(self.dtype, name="mlp")(LayerNorm(self.dtype, name="norm2")(x))
        return x + drop_path(y, deterministic=deterministic)


class PatchEmbed(nn.Module):
    width: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B h w C"]:
        proj = nn.Conv(self.width, (PATCH, PATCH), PATCH, padding="VALID", dtype=self.dtype, name="proj")
        return LayerNorm(self.dtype, name="norm")(proj(pad_to_multiple(images, PATCH)))


class PatchMerging(nn.Module):
    """Halves both sides and doubles the channels: the four cells of a 2×2 square, column by column, become one."""

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w C2"]:
        channels = x.shape[-1]
        x = pad_to_multiple(x, 2)
        batch, height, width, _ = x.shape
        x = x.reshape(batch, height // 2, 2, width // 2, 2, channels)
        x = x.transpose(0, 1, 3, 4, 2, 5).reshape(batch, height // 2, width // 2, 4 * channels)
        x = LayerNorm(self.dtype, name="norm")(x)
        return Dense(2 * channels, use_bias=False, dtype=self.dtype, name="reduction")(x)


class SwinStage(nn.Module):
    depth: int
    num_heads: int
    window: int
    drop_paths: tuple[float, ...]  # of each block
    merge: bool  # followed by a PatchMerging (all but the last stage)
    remat: Remat = "no"
    dtype: DTypeLike = jnp.float32

    def setup(self):
        block = recomputed(SwinBlock, self.remat, static_argnums=(2,))
        self.blocks = [
            block(self.num_heads, self.window, (i % 2) * (self.window // 2), self.drop_paths[i], self.dtype)
            for i in range(self.depth)
        ]
        if self.merge:
            self.downsample = PatchMerging(self.dtype)

    def __call__(
        self, x: Float[Array, "B h w C"], deterministic: bool
    ) -> tuple[Float[Array, "B h w C"], Float[Array, "B h2 w2 C2"]]:
        """The stage's map and the next stage's input (the same at the last stage)."""
        for block in self.blocks:
            x = block(x, deterministic)
        return x, self.downsample(x) if self.merge else x


class Swin(nn.Module):
    config: SwinConfig
    remat: Remat = "no"  # of the blocks
    dtype: DTypeLike = jnp.float32

    def setup(self):
        config = self.config
        rates = np.linspace(0, config.drop_path_rate, sum(config.depths))
        ends = np.cumsum(config.depths)
        self.patch_embed = PatchEmbed(config.embed_dim, self.dtype)
        self.layers = [
            SwinStage(
                depth,
                config.num_heads[i],
                config.window_size,
                tuple(float(rate) for rate in rates[ends[i] - depth : ends[i]]),
                merge=i < len(config.depths) - 1,
                remat=self.remat,
                dtype=self.dtype,
            )
            for i, depth in enumerate(config.depths)
        ]
        self.norm1, self.norm2, self.norm3 = (LayerNorm(self.dtype) for _ in range(3))

    def __call__(
        self, images: Float[Array, "B H W 3"], deterministic: bool = True
    ) -> tuple[Float[Array, "B h1 w1 C1"], Float[Array, "B h2 w2 C2"], Float[Array, "B h3 w3 C3"]]:
        """Normalised images → the maps of stages 2, 3 and 4 (strides 8, 16, 32), each through its own LayerNorm."""
        x = self.patch_embed(images)
        maps = []
        for stage in self.layers:
            out, x = stage(x, deterministic)
            maps.append(out)
        return self.norm1(maps[1]), self.norm2(maps[2]), self.norm3(maps[3])
