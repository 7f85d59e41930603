"""All names of the authors' checkpoints → the tree of model/opendet.py."""

from opendet_jax.weights.detector import DETECTOR_RULES
from opendet_jax.weights.rules import Rule
from opendet_jax.weights.swin import SWIN_RULES
from opendet_jax.weights.t5 import T5_RULES

OPENDET_RULES = (
    *SWIN_RULES,
    *DETECTOR_RULES,
    *T5_RULES,
    Rule(r"clip_model\..*", None),  # the frozen text encoder, kept in the same file: no part of the model
)
