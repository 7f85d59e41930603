"""The sizes of a model, read off the shapes of its tensors (and what shapes do not tell, off its config.json)."""

import re
from collections.abc import Mapping
from typing import Any

from opendet_jax.config import CLIPTextConfig, SwinConfig, T5Config
from opendet_jax.errors import WeightsError
from opendet_jax.weights.rules import Shape

STACKS = ("encoder", "decoder")


def _shape(shapes: Mapping[str, Shape], name: str, what: str) -> Shape:
    if name not in shapes:
        some = ", ".join(list(shapes)[:3])
        raise WeightsError(f"not {what}: there is no {name} among its {len(shapes)} names ({some}, …)")
    return shapes[name]


def _count(shapes: Mapping[str, Shape], pattern: str) -> int:
    """How many different numbers the pattern's group takes."""
    return len({match.group(1) for match in map(re.compile(pattern).match, shapes) if match})


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
    window = (round(tables[0][0] ** 0.5) + 1) // 2
    return SwinConfig(width[0], depths, tuple(heads for _, heads in tables), window)


def t5_sizes(shapes: Mapping[str, Shape], config: Mapping[str, Any], prefix: str = "") -> tuple[T5Config, int]:
    """(sizes, width E). `config` is Hugging Face's; without one, what shapes do not tell is as in Flan-T5."""
    vocab, width = _shape(shapes, f"{prefix}shared.weight", "a T5")
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
    rank = shapes.get(f"{prefix}lm_head.lora_A", (T5Config().lora_rank,))[0]
    sizes = T5Config(
        vocab_size=vocab,
        num_layers=layers["encoder"],
        num_heads=heads,
        head_width=inner // heads,
        ffn_width=hidden,
        gated=gated,
        relative_buckets=buckets,
        relative_max_distance=int(config.get("relative_attention_max_distance", 128)),
        head_bias=f"{prefix}lm_head.bias" in shapes,
        lora_rank=rank,
    )
    return sizes, width


def clip_sizes(shapes: Mapping[str, Shape], config: Mapping[str, Any]) -> CLIPTextConfig:
    """`config` is Hugging Face's, of the text tower or of the whole CLIP."""
    text = {**config, **config.get("text_config", {})} if config else {}
    vocab, width = _shape(shapes, "text_model.embeddings.token_embedding.weight", "CLIP's text tower")
    positions, _ = _shape(shapes, "text_model.embeddings.position_embedding.weight", "CLIP's text tower")
    projected, _ = _shape(shapes, "text_projection.weight", "CLIP's text tower with its projection")
    hidden, _ = _shape(shapes, "text_model.encoder.layers.0.mlp.fc1.weight", "CLIP's text tower")
    activation = text.get("hidden_act", "quick_gelu")
    if activation not in ("quick_gelu", "gelu"):
        raise WeightsError(f"config.json: hidden_act {activation!r} is not one that CLIP's text tower has here")
    return CLIPTextConfig(
        vocab_size=vocab,
        width=width,
        num_layers=_count(shapes, r"text_model\.encoder\.layers\.(\d+)\."),
        num_heads=int(text.get("num_attention_heads", width // 64)),
        ffn_width=hidden,
        max_tokens=positions,
        text_width=projected,
        activation=activation,
        end_token=int(text.get("eos_token_id", 49407)),
    )
