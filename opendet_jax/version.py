"""The package's version: one place, read by packaging and by the program."""

__version__ = "0.1.0"
