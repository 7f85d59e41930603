"""Matching and losses (paper section 3.6): plain functions on arrays, in float32."""
