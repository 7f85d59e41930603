"""The sizes of a model, read off the shapes of its tensors (and what shapes do not tell, off its config.json)."""

import re
from collections.abc import Mapping
from typing import Any

from opendet_jax.config import CLIPTextConfig, SwinConfig, T5Config
from opendet_jax.errors import WeightsError
from opendet_jax.weights.rules import Shape
from opendet_jax.weights.text import EMBEDDINGS

STACKS = ("encoder", "decoder")


def _shape(shapes: Mapping[str, Shape], name: str, what: str) -> Shape:
    if name not in shapes:
        some = ", ".join(list(shapes)[:3])
        raise WeightsError(f"not {what}: there is no {name} among its {len(shapes)} names ({some}, …)")
    return shapes[name]


def _count(shapes: Mapping[str, Shape], pattern: str) -> int:
    """How many different numbers the pattern's group takes."""
    return len({match.group(1) for match in map(re.compile(pattern).match, shapes) if match})


def _field(config: Mapping[str, Any], name: str, default: int) -> int:
    """A positive whole number of a config.json; `default` where it does not say."""
    value = config.get(name)
    if value is None:
        return default
    if type(value) is not int or value < 1:
        raise WeightsError(f"config.json: {name} is {value!r:.40}, not a positive whole number")
    return value


def swin_sizes(shapes: Mapping[str, Shape], prefix: str = "") -> SwinConfig:
    """Of names in the authors' layout after `prefix`, or in Hugging Face's."""
    theirs = f"{prefix}patch_embed.proj.weight" in shapes
    if theirs:
        patch, stage = f"{prefix}patch_embed.proj.weight", f"{prefix}layers"
        table = "attn.relative_position_bias_table"
    else:
        inner = "swin." if "swin.embeddings.norm.weight" in shapes else ""
        patch, stage = f"{inner}embeddings.patch_embeddings.projection.weight", f"{inner}encoder.layers"
        table = "attention.self.relative_position_bias_table"
    width = _shape(shapes, patch, "a Swin backbone")
    if len(width) != 4 or width[1:] != (3, 4, 4):
        raise WeightsError(f"not a Swin backbone for RGB with patches of 4 × 4: {patch} is {width}")
    stages = _count(shapes, re.escape(stage) + r"\.(\d+)\.")
    if stages != 4:
        raise WeightsError(f"not a Swin backbone of four stages but of {stages}")
    depths = tuple(_count(shapes, re.escape(f"{stage}.{i}.blocks") + r"\.(\d+)\.") for i in range(4))
    tables = [_shape(shapes, f"{stage}.{i}.blocks.0.{table}", "a Swin backbone") for i in range(4)]
    windows = [(round(rows**0.5) + 1) // 2 for rows, _ in tables]
    if len(set(windows)) > 1:
        raise WeightsError(f"not a Swin backbone of one window size: those of its stages are {windows}")
    return SwinConfig(width[0], depths, tuple(heads for _, heads in tables), windows[0])


def t5_sizes(shapes: Mapping[str, Shape], config: Mapping[str, Any], prefix: str = "") -> tuple[T5Config, int]:
    """(sizes, width E). `config` is Hugging Face's; without one, what shapes do not tell is as in Flan-T5."""
    listed = next((name for name in EMBEDDINGS if f"{prefix}{name}.weight" in shapes), EMBEDDINGS[0])
    vocab, width = _shape(shapes, f"{prefix}{listed}.weight", "a T5")
    layers = {stack: _count(shapes, re.escape(f"{prefix}{stack}.block") + r"\.(\d+)\.") for stack in STACKS}
    if layers["encoder"] != layers["decoder"]:
        raise WeightsError(f"a T5 with as many layers in encoder and decoder is needed, not {layers}")
    attention = f"{prefix}encoder.block.0.layer.0.SelfAttention"
    buckets, heads = _shape(shapes, f"{attention}.relative_attention_bias.weight", "a T5")
    inner, _ = _shape(shapes, f"{attention}.q.weight", "a T5")
    ffn = f"{prefix}encoder.block.0.layer.1.DenseReluDense"
    gated = f"{ffn}.wi_0.weight" in shapes
    hidden, _ = _shape(shapes, f"{ffn}.{'wi_0' if gated else 'wi'}.weight", "a T5")
    activation = str(config.get("feed_forward_proj", "gated-gelu" if gated else "relu"))
    if activation not in ("gated-gelu", "gated-gelu_new", "relu"):
        raise WeightsError(f"config.json: feed_forward_proj {activation!r} is not one that this T5 has")
    if activation.startswith("gated") != gated:
        raise WeightsError(f"config.json: feed_forward_proj is {activation!r}, which the names of the tensors are not")
    rank = shapes.get(f"{prefix}lm_head.lora_A", (T5Config().lora_rank,))[0]
    sizes = T5Config(
        vocab_size=vocab,
        num_layers=layers["encoder"],
        num_heads=heads,
        head_width=inner // heads,
        ffn_width=hidden,
        gated=gated,
        relative_buckets=buckets,
        relative_max_distance=_field(config, "relative_attention_max_distance", 128),
        head_bias=f"{prefix}lm_head.bias" in shapes,
        lora_rank=rank,
    )
    return sizes, width


def clip_sizes(shapes: Mapping[str, Shape], config: Mapping[str, Any]) -> CLIPTextConfig:
    """`config` is Hugging Face's, of the text tower or of the whole CLIP."""
    inner = config.get("text_config") or {}
    if not isinstance(inner, Mapping):
        raise WeightsError(f"config.json: text_config is {inner!r:.40}, not an object of fields")
    text = {**config, **inner}
    vocab, width = _shape(shapes, "text_model.embeddings.token_embedding.weight", "CLIP's text tower")
    positions, _ = _shape(shapes, "text_model.embeddings.position_embedding.weight", "CLIP's text tower")
    projected, _ = _shape(shapes, "text_projection.weight", "CLIP's text tower with its projection")
    hidden, _ = _shape(shapes, "text_model.encoder.layers.0.mlp.fc1.weight", "CLIP's text tower")
    activation = text.get("hidden_act") or "quick_gelu"
    heads = _field(text, "num_attention_heads", max(1, width // 64))
    if width % heads:
        raise WeightsError(f"config.json: num_attention_heads is {heads}, which does not divide the width {width}")
    if activation not in ("quick_gelu", "gelu"):
        raise WeightsError(f"config.json: hidden_act {activation!r} is not one that CLIP's text tower has here")
    return CLIPTextConfig(
        vocab_size=vocab,
        width=width,
        num_layers=_count(shapes, r"text_model\.encoder\.layers\.(\d+)\."),
        num_heads=heads,
        ffn_width=hidden,
        max_tokens=positions,
        text_width=projected,
        activation=activation,
        end_token=_field(text, "eos_token_id", 49407),
    )
