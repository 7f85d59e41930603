"""The second, independent reference: transformers' PyTorch models with random weights, saved to disk by it and read by
our converter. Two sizes each. They compute in float64, so that the difference is our own rounding.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import CLIPTextConfig as TheirCLIPConfig
from transformers import CLIPTextModelWithProjection, SwinBackbone, T5ForConditionalGeneration
from transformers import SwinConfig as TheirSwinConfig
from transformers import T5Config as TheirT5Config

from opendet_jax.config import CLIPTextConfig, SwinConfig, T5Config
from opendet_jax.model.clip_text import CLIPText
from opendet_jax.model.swin import Swin
from opendet_jax.model.t5 import T5
from opendet_jax.weights.convert import convert
from opendet_jax.weights.source import read_source
from tests.parity import report

MODEL, LOGITS = 5e-5, 1e-4  # of a whole model's outputs, and of T5's logits, as against the authors' program
REFERENCE = "transformers, PyTorch"


def assert_close(stage: str, want, got, tolerance: float = MODEL) -> None:
    want, got = np.asarray(want), np.asarray(got)
    report.enter(stage, REFERENCE, want, got, tolerance)
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance)


def randomise(model, seed: int):
    """Weights far from their initial values, so that nothing hides behind a zero or a one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.1 if parameter.ndim < 2 or "embed" in name or "bias" in name else parameter.shape[-1] ** -0.5
            noise = scale * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise + 1 if "norm" in name.lower() and name.endswith("weight") else noise)
    return model.eval()


SWIN_SIZES = {
    "small": {"embed_dim": 8, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 2, 4], "window_size": 3},
    "larger": {"embed_dim": 24, "depths": [1, 2, 3, 1], "num_heads": [2, 3, 6, 12], "window_size": 7},
}


@pytest.mark.parametrize("size", SWIN_SIZES)
@pytest.mark.parametrize("image", [(64, 96), (52, 71)], ids=["fits", "does-not-fit-the-window"])
def test_swin(tmp_path, size, image):
    stages = ["stage2", "stage3", "stage4"]
    peer = randomise(SwinBackbone(TheirSwinConfig(**SWIN_SIZES[size], out_features=stages)), seed=0)
    peer.save_pretrained(tmp_path)
    pixels = np.random.default_rng(1).standard_normal((2, 3, *image), np.float32)
    with torch.no_grad():
        want = [out.numpy() for out in peer.double()(torch.from_numpy(pixels).double()).feature_maps]
    converted = convert("swin", read_source(str(tmp_path))).converted
    sizes = {key: tuple(x) if isinstance(x, list) else x for key, x in converted.config.items()}
    run = jax.jit(Swin(SwinConfig(**sizes)).apply)
    got = run({"params": converted.params}, jnp.asarray(pixels.transpose(0, 2, 3, 1)))
    for ours, theirs in zip(got, want, strict=True):
        assert_close("Swin (transformers)", theirs, np.asarray(ours).transpose(0, 3, 1, 2))


T5_SIZES = {
    "small": {"d_model": 24, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 3, "vocab_size": 23},
    "larger": {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 3, "num_heads": 4, "vocab_size": 150},
}


@pytest.mark.parametrize("size", T5_SIZES)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
@pytest.mark.parametrize("buckets", [8, 32])
@pytest.mark.parametrize(("positions", "length"), [(1, 6), (50, 45)])  # 45 and 50: past the last exact bucket
def test_t5(tmp_path, size, gated, buckets, positions, length):
    """Gated: Flan-T5, whose head is a matrix of its own. Ungated: the first T5, whose head is its embedding, scaled."""
    sizes = T5_SIZES[size] | {"relative_attention_num_buckets": buckets, "relative_attention_max_distance": 20}
    activation = "gated-gelu" if gated else "relu"
    peer = T5ForConditionalGeneration(
        TheirT5Config(**sizes, feed_forward_proj=activation, tie_word_embeddings=not gated, decoder_start_token_id=0)
    )
    if gated:  # version 5 of transformers ties the head whatever the config says, and saves none
        peer.lm_head = torch.nn.Linear(sizes["d_model"], sizes["vocab_size"], bias=False)
    randomise(peer, seed=1)
    if not gated:
        peer.tie_weights()
    peer.save_pretrained(tmp_path)
    if gated:
        state = load_file(tmp_path / "model.safetensors")
        save_file(state | {"lm_head.weight": peer.lm_head.weight.detach().numpy()}, tmp_path / "model.safetensors")
    rng = np.random.default_rng(2)
    embeddings = rng.standard_normal((3, positions, sizes["d_model"]), np.float32)
    tokens = rng.integers(2, sizes["vocab_size"], (3, length))
    with torch.no_grad():
        inputs = torch.from_numpy(embeddings).double()
        out = peer.double()(inputs_embeds=inputs, decoder_input_ids=torch.from_numpy(tokens))

    converted = convert("t5", read_source(str(tmp_path))).converted
    config = {key: value for key, value in converted.config.items() if key != "text_width"}
    t5 = T5(T5Config(**config), sizes["d_model"], lora=False, dtype=jnp.dtype("float32"))

    def run(params, embeddings, tokens):
        def forward(t5):
            memory = t5.encode(embeddings)
            return memory, t5.head(t5.decode(tokens, memory, jnp.ones(tokens.shape, bool)))

        return t5.apply({"params": params}, method=forward)

    memory, logits = jax.jit(run)(converted.params, jnp.asarray(embeddings), jnp.asarray(tokens))
    stage = f"T5, {'gated' if gated else 'ungated'} (transformers)"
    assert_close(stage, out.encoder_last_hidden_state.numpy(), memory)
    assert_close(stage, out.logits.numpy(), logits, LOGITS)


CLIP_SIZES = {
    "small": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    "larger": {"hidden_size": 96, "intermediate_size": 200, "num_hidden_layers": 4, "num_attention_heads": 6},
}


@pytest.mark.parametrize("size", CLIP_SIZES)
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("end", [2, 98], ids=["old-config", "new-config"])
def test_clip_text(tmp_path, size, activation, end):
    """Names of several lengths, padded; with a config that knows the end token, and with one of the older ones."""
    config = TheirCLIPConfig(
        **CLIP_SIZES[size], vocab_size=99, projection_dim=48, max_position_embeddings=20, hidden_act=activation,
        bos_token_id=97, eos_token_id=end,
    )  # fmt: skip
    peer = randomise(CLIPTextModelWithProjection(config), seed=2)
    peer.save_pretrained(tmp_path)
    rng = np.random.default_rng(3)
    tokens = np.zeros((5, 20), np.int64)
    for row, length in enumerate((1, 3, 8, 15, 18)):
        tokens[row, : length + 2] = [97, *rng.integers(3, 97, length), 98]
    with torch.no_grad():
        want = peer.double()(input_ids=torch.from_numpy(tokens)).text_embeds.numpy()
    converted = convert("clip", read_source(str(tmp_path))).converted
    ours = CLIPTextConfig(**converted.config)
    assert (ours.activation, ours.end_token) == (activation, end)
    got = jax.jit(CLIPText(ours).apply)({"params": converted.params}, jnp.asarray(tokens))
    assert_close("CLIP text (transformers)", want, got)


def test_clip_text_inside_a_whole_clip(tmp_path):
    """A CLIPModel's file holds the image tower too; its names are known, and left out."""
    from transformers import CLIPConfig, CLIPModel

    text = CLIP_SIZES["small"] | {"vocab_size": 99, "max_position_embeddings": 20}
    text |= {"bos_token_id": 97, "eos_token_id": 98}
    vision = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    peer = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).eval()
    peer.save_pretrained(tmp_path)
    tokens = np.array([[97, 5, 6, 98, 0], [97, 7, 98, 0, 0]])
    with torch.no_grad():
        peer = peer.double()
        pooled = peer.text_model(input_ids=torch.from_numpy(tokens)).pooler_output
        want = peer.text_projection(pooled).numpy()
    converted = convert("clip", read_source(str(tmp_path))).converted
    got = CLIPText(CLIPTextConfig(**converted.config)).apply({"params": converted.params}, jnp.asarray(tokens))
    assert_close("CLIP text (transformers)", want, got)
