"""What files of the hub hold: the same numbers in every layout are the same tree, and each dead tensor has its name."""

import json
import re

import jax
import numpy as np
import pytest
import torch
from transformers import SwinBackbone, SwinForMaskedImageModeling, SwinModel, T5ForConditionalGeneration
from transformers import SwinConfig as TheirSwinConfig
from transformers import T5Config as TheirT5Config

from opendet_jax.config import SwinConfig
from opendet_jax.errors import WeightsError
from opendet_jax.weights.backbone import AUTHORS_SWIN_RULES, SWIN_RULES
from opendet_jax.weights.convert import Conversion, convert, swin_shapes
from opendet_jax.weights.rules import flat, nested
from opendet_jax.weights.sizes import clip_sizes, swin_sizes, t5_sizes
from opendet_jax.weights.source import Source

SWIN = SwinConfig(16, (1, 2, 1, 1), (1, 2, 4, 8), 4)
THEIR_SWIN = TheirSwinConfig(embed_dim=16, depths=[1, 2, 1, 1], num_heads=[1, 2, 4, 8], window_size=4, image_size=64)
E = 32
T5 = {"d_model": E, "d_kv": 16, "d_ff": 40, "num_layers": 1, "num_heads": 2, "vocab_size": 24}
CROSS_BIAS = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"


def converted(kind: str, state, config=None) -> Conversion:
    return convert(kind, Source("x.pth", (), state, config or {}, ""))


def assert_same(tree, expected) -> None:
    jax.tree.map(np.testing.assert_array_equal, tree, expected)


@pytest.fixture(scope="module")
def tree() -> dict:
    """A backbone of random numbers whose norms of stages are as a classifier's start: ones and zeros."""
    rng = np.random.default_rng(0)
    leaves = {path: rng.standard_normal(shape, np.float32) for path, shape in swin_shapes(SWIN).items()}
    for number in (1, 2, 3):
        leaves[f"norm{number}/scale"] = np.ones_like(leaves[f"norm{number}/scale"])
        leaves[f"norm{number}/bias"] = np.zeros_like(leaves[f"norm{number}/bias"])
    return nested(leaves)


@pytest.fixture(scope="module")
def authors(tree) -> dict[str, np.ndarray]:
    """Swin's authors' file of a classifier, with all that stands beside the backbone."""
    state = {name: x for name, x in AUTHORS_SWIN_RULES.to_theirs(tree).items() if not name.startswith("norm")}
    state |= {"norm.weight": np.ones(128, np.float32), "norm.bias": np.zeros(128, np.float32)}
    state |= {"head.weight": np.zeros((5, 128), np.float32), "head.bias": np.zeros(5, np.float32)}
    state["layers.0.blocks.0.attn.relative_position_index"] = np.zeros((16, 16), np.int64)
    state["layers.1.blocks.1.attn_mask"] = np.zeros((4, 16, 16), np.float32)
    return state


def as_timm(authors) -> dict[str, np.ndarray]:
    """timm merges patches at the beginning of a stage, and its classifier is head.fc."""
    state = {}
    for name, value in authors.items():
        name = re.sub(r"^layers\.(\d)\.downsample", lambda stage: f"layers.{int(stage[1]) + 1}.downsample", name)
        state[name.replace("head.", "head.fc.")] = value
    return state


def test_swin_in_every_layout_is_the_same_tree(tree, authors):
    timm = as_timm(authors)
    assert "layers.3.downsample.reduction.weight" in timm
    assert "layers.0.downsample.reduction.weight" not in timm
    hub = {name: x for name, x in SWIN_RULES.to_theirs(tree).items() if not name.startswith("hidden_states_norms")}
    layouts = {
        "authors": authors,
        "timm": timm,
        "timm without buffers": {name: x for name, x in timm.items() if "mask" not in name and "index" not in name},
        "timm's features": {re.sub(r"^layers\.", "layers_", name): x for name, x in timm.items() if "head" not in name},
        "Hugging Face": hub,
        "a classifier of Hugging Face's": {f"swin.{name}": x for name, x in hub.items()},
        "DDP": {f"module.{name}": x for name, x in timm.items()},
        "a detector's": {f"model.backbone.{name}": x for name, x in authors.items()} | {"model.head.w": np.ones(1)},
        "SimMIM": {f"encoder.{name}": x for name, x in authors.items()} | {"encoder.mask_token": np.zeros((1, 1, 16))},
    }
    for layout, state in layouts.items():
        conversion = converted("swin", state)
        assert conversion.converted.config["depths"] == (1, 2, 1, 1), layout
        assert_same(conversion.converted.params, tree)


def test_swin_as_it_is_in_memory(tree):
    """transformers 5 saves other names than its models have: both are read."""
    torch.manual_seed(0)
    for model in (SwinModel(THEIR_SWIN), SwinBackbone(THEIR_SWIN), SwinForMaskedImageModeling(THEIR_SWIN)):
        in_memory = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
        assert any("attention.q_proj" in name for name in in_memory)
        params = converted("swin", in_memory).converted.params
        path = "encoder.layers.1.blocks.0.attention.k_proj.weight"
        key = next(x for name, x in in_memory.items() if name.endswith(path))
        np.testing.assert_array_equal(params["layers_1"]["blocks_0"]["attn"]["qkv"]["kernel"][:, 32:64], key.T)


def test_timms_tiny_swin(tree):
    """Names and shapes of swin_tiny_patch4_window7_224, as published: 27.5 million parameters of ours."""
    shapes = {"patch_embed.proj.weight": (96, 3, 4, 4), "patch_embed.proj.bias": (96,)}
    shapes |= {f"patch_embed.norm.{kind}": (96,) for kind in ("weight", "bias")}
    for stage, depth in enumerate((2, 2, 6, 2)):
        width, heads = 96 * 2**stage, 3 * 2**stage
        if stage:
            shapes |= {f"layers.{stage}.downsample.norm.{kind}": (2 * width,) for kind in ("weight", "bias")}
            shapes[f"layers.{stage}.downsample.reduction.weight"] = (width, 2 * width)
        for block in range(depth):
            name = f"layers.{stage}.blocks.{block}"
            shapes |= {f"{name}.norm{n}.{kind}": (width,) for n in (1, 2) for kind in ("weight", "bias")}
            shapes |= {f"{name}.attn.relative_position_bias_table": (169, heads)}
            shapes |= {f"{name}.attn.qkv.weight": (3 * width, width), f"{name}.attn.qkv.bias": (3 * width,)}
            shapes |= {f"{name}.attn.proj.weight": (width, width), f"{name}.attn.proj.bias": (width,)}
            shapes |= {f"{name}.mlp.fc1.weight": (4 * width, width), f"{name}.mlp.fc1.bias": (4 * width,)}
            shapes |= {f"{name}.mlp.fc2.weight": (width, 4 * width), f"{name}.mlp.fc2.bias": (width,)}
    shapes |= {"norm.weight": (768,), "norm.bias": (768,), "head.fc.weight": (1000, 768), "head.fc.bias": (1000,)}
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 28_288_354  # as timm counts
    conversion = converted("swin", {name: np.zeros(shape, np.float32) for name, shape in shapes.items()})
    assert sum(x.size for x in flat(conversion.converted.params).values()) == 27_520_506
    assert (conversion.used, sum(map(len, conversion.left_out.values()))) == (len(shapes) - 4, 4)


def test_what_is_used_and_left_out_is_counted(authors):
    conversion = converted("swin", {f"module.{name}": x for name, x in as_timm(authors).items()})
    count = len(authors)
    assert conversion.describe() == [
        f"{count} names are read without the 'module.' before them",
        "new, as the source has none: norms of the stages' outputs, ones and zeros "
        "(norm1.weight, norm1.bias, norm2.weight, norm2.bias, norm3.weight, norm3.bias)",
        f"{count - 6} of {count} tensors used, 6 left out",
        "left out: 2, the last norm, which only a classifier sees (norm.weight, norm.bias)",
        "left out: 2, the classifier that the backbone was trained as (head.fc.weight, head.fc.bias)",
        "left out: 2, computed, not learned "
        "(layers.0.blocks.0.attn.relative_position_index, layers.1.blocks.1.attn_mask)",
    ]


def test_norms_of_some_stages_are_kept(tree):
    """A backbone that gives the last stage alone has one norm; one that gives all has that of the first too."""
    theirs = AUTHORS_SWIN_RULES.to_theirs(tree)
    theirs["norm3.weight"] = theirs["norm3.weight"] * 2
    last = {name: x for name, x in theirs.items() if not name.startswith(("norm1", "norm2"))}
    conversion = converted("swin", last)
    np.testing.assert_array_equal(conversion.converted.params["norm3"]["scale"], theirs["norm3.weight"])
    assert (np.asarray(conversion.converted.params["norm1"]["scale"]) == 1).all()
    everything = converted("swin", theirs | {"norm0.weight": np.ones(16), "norm0.bias": np.zeros(16)})
    assert [*everything.left_out] == ["the norm of the first stage, which the detector does not see"]
    assert everything.notes == ()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"absolute_pos_embed": np.zeros((1, 256, 16), np.float32)}, "names that nothing uses:\n  absolute_pos_embed"),
        ({"layers.2.blocks.0.attn.relative_position_bias_table": np.zeros((169, 4))}, "one window size: .* 4, 7, 4"),
        ({"layers.0.blocks.0.mlp.fc1.weight": np.zeros((64, 16), np.int8)}, "fc1.weight is int8: a quantised file"),
        ({"layers.0.blocks.0.mlp.fc1.bias": np.full(64, np.nan, np.float32)}, "fc1.bias holds NaN or infinity"),
        ({"layers.0.blocks.0.mlp.fc1.bias": np.full(64, 1e300)}, "fc1.bias holds NaN or infinity"),
        ({"layers.3.downsample.reduction.weight": np.zeros((128, 256))}, "names that nothing uses"),
    ],
)
def test_swins_that_are_not_ours(authors, changed, message):
    with pytest.raises(WeightsError, match=message):
        converted("swin", authors | changed)


def saved_t5(**config) -> tuple[dict[str, np.ndarray], dict]:
    """A T5 as a file of torch's lists it: every name of the embedding, and the head's."""
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(TheirT5Config(**T5 | config))
    state = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    return state, json.loads(model.config.to_json_string(use_diff=False))


def test_a_t5s_dead_tensor_is_named():
    state, config = saved_t5(tie_word_embeddings=False)
    want = converted("t5", state, config).converted.params
    old = converted("t5", state | {CROSS_BIAS: np.ones((32, 2), np.float32)}, config)
    assert_same(old.converted.params, want)
    assert old.left_out == {"an old file's tensor that T5 never had a use for": [CROSS_BIAS]}
    assert old.used == len(state)
    other = CROSS_BIAS.replace(".weight", ".scale")
    with pytest.raises(WeightsError, match="names that nothing uses"):
        converted("t5", state | {other: np.ones((32, 2), np.float32)}, config)


@pytest.mark.parametrize("listed", ["everything", "the embedding", "the decoder's", "the head"])
def test_the_first_t5s_head_is_its_embedding_scaled(listed):
    """One matrix, under whichever of its four names the file has it; the logits are those of transformers."""
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(TheirT5Config(**T5)).eval()
    state, config = saved_t5()
    assert config["scale_decoder_outputs"]
    del config["scale_decoder_outputs"]  # published before it was written
    names = {"shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"}
    kept = {"everything": names, "the embedding": {"shared.weight"}, "the decoder's": {"decoder.embed_tokens.weight"}}
    missing = names - kept.get(listed, {"lm_head.weight"})
    params = converted("t5", {name: x for name, x in state.items() if name not in missing}, config).converted.params
    hidden = torch.randn(1, 3, E)
    with torch.no_grad():
        want = model.lm_head(hidden * E**-0.5)
    np.testing.assert_allclose(hidden.numpy() @ np.asarray(params["lm_head"]["kernel"]), want.numpy(), atol=1e-5)
    np.testing.assert_array_equal(params["shared"]["embedding"], state["shared.weight"])


@pytest.mark.parametrize(
    ("gated", "listed", "config", "factor"),
    [
        (False, False, {}, E**-0.5),
        (False, True, {}, E**-0.5),
        (True, True, {}, 1.0),
        (True, True, {"tie_word_embeddings": False}, 1.0),
        (True, False, {"tie_word_embeddings": True}, E**-0.5),
        (True, False, {"tie_word_embeddings": True, "scale_decoder_outputs": False}, 1.0),
    ],
)
def test_what_the_head_is_where_the_file_does_not_say(gated, listed, config, factor):
    state, _ = saved_t5(feed_forward_proj="gated-gelu" if gated else "relu")
    if not listed:
        del state["lm_head.weight"]
    if config:
        config |= {"feed_forward_proj": "gated-gelu" if gated else "relu"}
    conversion = converted("t5", state, config)
    head = np.asarray(conversion.converted.params["lm_head"]["kernel"])
    np.testing.assert_array_equal(head, state["shared.weight"].T * np.float32(factor))
    assert any(line.startswith(f"the head is the embedding times {factor:.4g}") for line in conversion.notes)


def test_heads_of_which_nothing_is_known():
    state, config = saved_t5(feed_forward_proj="gated-gelu")
    without = {name: x for name, x in state.items() if name != "lm_head.weight"}
    with pytest.raises(WeightsError, match=r"no lm_head\.weight, and no config\.json beside it says"):
        converted("t5", without)
    other = state | {"lm_head.weight": state["lm_head.weight"] + 1}
    with pytest.raises(WeightsError, match=r"lm_head\.weight and shared\.weight differ"):
        converted("t5", other, config)
    kernel = converted("t5", other).converted.params["lm_head"]["kernel"]
    np.testing.assert_array_equal(kernel, other["lm_head.weight"].T)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("relative_attention_max_distance", "128", "relative_attention_max_distance is '128', not a positive whole"),
        ("relative_attention_max_distance", None, ""),
        ("feed_forward_proj", "gated-gelu", "which the names of the tensors are not"),
        ("feed_forward_proj", "gated-silu", "feed_forward_proj 'gated-silu' is not one"),
        ("feed_forward_proj", 3, "feed_forward_proj '3' is not one"),
    ],
)
def test_a_config_beside_a_t5_that_cannot_be(field, value, message):
    state, config = saved_t5()
    shapes, config = {name: x.shape for name, x in state.items()}, config | {field: value}
    if not message:
        assert t5_sizes(shapes, config)[0].relative_max_distance == 128
        return
    with pytest.raises(WeightsError, match=message):
        t5_sizes(shapes, config)


CLIP_SHAPES = {
    "text_model.embeddings.token_embedding.weight": (100, 64),
    "text_model.embeddings.position_embedding.weight": (77, 64),
    "text_projection.weight": (32, 64),
    "text_model.encoder.layers.0.mlp.fc1.weight": (128, 64),
}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"text_config": None}, ""),
        ({"text_config": []}, ""),
        ({"text_config": "x"}, "text_config is 'x', not an object"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0, not a positive whole number"),
        ({"num_attention_heads": 5}, "num_attention_heads is 5, which does not divide the width 64"),
        ({"text_config": {"eos_token_id": [1]}}, r"eos_token_id is \[1\], not a positive whole number"),
        ({"hidden_act": "relu"}, "hidden_act 'relu' is not one"),
    ],
)
def test_a_config_beside_clip_that_cannot_be(config, message):
    if not message:
        assert clip_sizes(CLIP_SHAPES, config).num_heads == 1
        return
    with pytest.raises(WeightsError, match=message):
        clip_sizes(CLIP_SHAPES, config)


def test_swin_v2_is_another_model(authors):
    shapes = {name: x.shape for name, x in authors.items() if "relative_position_bias_table" not in name}
    with pytest.raises(WeightsError, match=r"not a Swin backbone: there is no layers\.0\.blocks\.0\.attn\.relative"):
        swin_sizes(shapes)
