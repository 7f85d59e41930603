"""Stands in the place of PyTorch, which the tests have and users do not need."""

raise ImportError("not here")
