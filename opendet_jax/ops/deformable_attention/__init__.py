"""Multi-scale deformable attention: each query reads a few points of a feature pyramid, bilinearly, and sums them."""

from opendet_jax.ops.deformable_attention.xla import deformable_attention

__all__ = ["deformable_attention"]
