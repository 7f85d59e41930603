"""Swin in its authors' checkpoints, in timm's and in Hugging Face's ↔ the tree of model/swin.py."""

import re
from collections.abc import Collection, Iterator, Mapping
from typing import TypeVar

from opendet_jax.weights.rules import LINEAR, Part, Rule, Rules, convolution, dead, dense, norm

STAGES = range(4)
QKV = ("query", "key", "value")  # Hugging Face's names of the parts of one matrix, in its order
COMPUTED = "computed, not learned"
CLASSIFIER = "the classifier that the backbone was trained as"
LAST_NORM = "the last norm, which only a classifier sees"
FIRST_NORM = "the norm of the first stage, which the detector does not see"
MASKING = "of the pre-training with masks"
T = TypeVar("T")


def _merging(prefix: str, path: str, first: int) -> Iterator[Rule]:
    """The merging of patches between two stages; `first` is the number of the stage that holds the first of them."""
    for stage in STAGES[:-1]:
        name, ours = f"{prefix}layers.{stage + first}.downsample", f"{path}layers_{stage}/downsample"
        yield from norm(f"{name}.norm", f"{ours}/norm")
        yield Rule(f"{name}.reduction.weight", f"{ours}/reduction/kernel", LINEAR)


def authors_rules(prefix: str, path: str, first_merging: int = 0) -> tuple[Rule, ...]:
    """`prefix`: what stands before the first name, its last dot included; `path`: of the backbone, likewise.

    Swin's authors merge patches at the end of a stage (`first_merging` 0), timm at the beginning of the next (1).
    """
    block, ours = f"{prefix}layers.{{i}}.blocks.{{j}}", f"{path}layers_{{i}}/blocks_{{j}}"
    return (
        *convolution(f"{prefix}patch_embed.proj", f"{path}patch_embed/proj"),
        *norm(f"{prefix}patch_embed.norm", f"{path}patch_embed/norm"),
        *(rule for n in (1, 2) for rule in norm(f"{block}.norm{n}", f"{ours}/norm{n}")),
        *(rule for n in ("qkv", "proj") for rule in dense(f"{block}.attn.{n}", f"{ours}/attn/{n}")),
        Rule(f"{block}.attn.relative_position_bias_table", f"{ours}/attn/relative_position_bias_table"),
        *(rule for n in ("fc1", "fc2") for rule in dense(f"{block}.mlp.{n}", f"{ours}/mlp/{n}")),
        *_merging(prefix, path, first_merging),
        *(rule for n in (1, 2, 3) for rule in norm(f"{prefix}norm{n}", f"{path}norm{n}")),
        *dead(COMPUTED, (f"{block}.attn.relative_position_index", f"{block}.attn_mask")),
    )


def _both(*names: str) -> list[str]:
    return [f"{name}.{kind}" for name in names for kind in ("weight", "bias")]


_BESIDE = (
    *dead(CLASSIFIER, _both("head", "head.fc")),  # timm's is head.fc
    *dead(LAST_NORM, _both("norm")),
    *dead(FIRST_NORM, _both("norm0")),
    *dead(MASKING, ("mask_token",)),
)
AUTHORS_SWIN_RULES = Rules((*authors_rules("", ""), *_BESIDE))
TIMM_SWIN_RULES = Rules((*authors_rules("", "", first_merging=1), *_BESIDE))


def _hugging_face(prefix: str) -> tuple[Rule, ...]:
    embeddings = f"{prefix}embeddings"
    block, ours = f"{prefix}encoder.layers.{{i}}.blocks.{{j}}", "layers_{i}/blocks_{j}"
    merging, ours_merging = f"{prefix}encoder.layers.{{i}}.downsample", "layers_{i}/downsample"
    packed = []
    for number, projection in enumerate(QKV):
        name, part = f"{block}.attention.self.{projection}", Part(number, 3)
        packed += [
            Rule(f"{name}.weight", f"{ours}/attn/qkv/kernel", LINEAR, part),
            Rule(f"{name}.bias", f"{ours}/attn/qkv/bias", part=part),
        ]
    return (
        *convolution(f"{embeddings}.patch_embeddings.projection", "patch_embed/proj"),
        *norm(f"{embeddings}.norm", "patch_embed/norm"),
        *packed,
        *dense(f"{block}.attention.output.dense", f"{ours}/attn/proj"),
        Rule(f"{block}.attention.self.relative_position_bias_table", f"{ours}/attn/relative_position_bias_table"),
        *norm(f"{block}.layernorm_before", f"{ours}/norm1"),
        *norm(f"{block}.layernorm_after", f"{ours}/norm2"),
        *dense(f"{block}.intermediate.dense", f"{ours}/mlp/fc1"),
        *dense(f"{block}.output.dense", f"{ours}/mlp/fc2"),
        *norm(f"{merging}.norm", f"{ours_merging}/norm"),
        Rule(f"{merging}.reduction.weight", f"{ours_merging}/reduction/kernel", LINEAR),
        *dead(COMPUTED, (f"{block}.attention.self.relative_position_index",)),
        *dead(LAST_NORM, _both(f"{prefix}layernorm")),
        *dead(MASKING, (f"{embeddings}.mask_token",)),
    )


def hugging_face_rules(prefix: str) -> Rules:
    """`prefix`: "" for SwinModel and SwinBackbone, "swin." for a whole classifier."""
    return Rules(
        (
            *_hugging_face(prefix),
            *(rule for n in (1, 2, 3) for rule in norm(f"hidden_states_norms.stage{n + 1}", f"norm{n}")),
            *dead(FIRST_NORM, _both("hidden_states_norms.stage1")),
            *dead(LAST_NORM, _both("swin.layernorm")),
            *dead(CLASSIFIER, _both("classifier")),
            *dead(MASKING, _both("decoder.0")),
        )
    )


SWIN_RULES = hugging_face_rules("")

# What a name ends in, in the authors' layout and in Hugging Face's: it tells where the backbone is in a larger model.
ANCHORS = (
    "swin.embeddings.patch_embeddings.projection.weight",
    "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.weight",
)
# transformers 5 saves by Hugging Face's names, but its models in memory have others: (theirs, those of the files).
_IN_MEMORY = (
    *((rf"\.attention\.{short}_proj\.", f".attention.self.{long}.") for short, long in zip("qkv", QKV, strict=True)),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.attention\.relative_position_bias\.", ".attention.self."),
    (r"^((?:swin\.)?encoder\..*)\.mlp\.fc1\.", r"\1.intermediate.dense."),
    (r"^((?:swin\.)?encoder\..*)\.mlp\.fc2\.", r"\1.output.dense."),
    # timm's backbones that give features have no list of stages
    (r"^layers_(\d)\.", r"layers.\1."),
)


def with_names_of_files(state: Mapping[str, T]) -> dict[str, T]:
    """Names of models in memory as those that files have; all others stay."""
    return {_renamed(name): value for name, value in state.items()}


def _renamed(name: str) -> str:
    for pattern, replacement in _IN_MEMORY:
        name = re.sub(pattern, replacement, name)
    return name


def is_timms(names: Collection[str]) -> bool:
    """Whether patches are merged at the beginning of stages, in the authors' names."""
    return not any(name.startswith("layers.0.downsample.") for name in names)
