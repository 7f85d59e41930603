"""Converting what the real libraries save: the commands as a user runs them, the folders they write, and training's
start from them."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import CLIPTextConfig as TheirCLIPConfig
from transformers import CLIPTextModelWithProjection, SwinBackbone, SwinModel, T5ForConditionalGeneration
from transformers import SwinConfig as TheirSwinConfig
from transformers import T5Config as TheirT5Config

from opendet_jax.checkpoints.folder import Converted, load, read_note, save
from opendet_jax.config import Config, InitConfig, SwinConfig, T5Config
from opendet_jax.errors import WeightsError
from opendet_jax.model import t5 as our_t5
from opendet_jax.model.opendet import OpenDet, init_params
from opendet_jax.weights.__main__ import main
from opendet_jax.weights.backbone import AUTHORS_SWIN_RULES
from opendet_jax.weights.embed_names import load_text_encoder
from opendet_jax.weights.init import check_start, describe, initialise
from opendet_jax.weights.open_det import OPENDET_RULES
from opendet_jax.weights.rules import flat, shapes_of
from opendet_jax.weights.source import read_source
from tests.model.conftest import TINY

E = 32
SWIN = {"embed_dim": 16, "depths": [1, 2, 1, 1], "num_heads": [1, 2, 4, 8], "window_size": 4, "image_size": 64}
T5 = {"d_model": E, "d_kv": 16, "d_ff": 40, "num_layers": 1, "num_heads": 2, "vocab_size": 24}
T5 |= {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
CLIP = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
CLIP |= {"projection_dim": E, "eos_token_id": 49407}


@pytest.fixture(scope="module")
def published(tmp_path_factory, data_folder) -> Path:
    """A folder of each kind, saved by transformers."""
    folder = tmp_path_factory.mktemp("published")
    torch.manual_seed(0)
    SwinModel(TheirSwinConfig(**SWIN)).save_pretrained(folder / "swin")
    stages = TheirSwinConfig(**SWIN, out_features=["stage2", "stage3", "stage4"])
    SwinBackbone(stages).save_pretrained(folder / "backbone")
    T5ForConditionalGeneration(TheirT5Config(**T5)).save_pretrained(folder / "t5")
    CLIPTextModelWithProjection(TheirCLIPConfig(**CLIP)).save_pretrained(folder / "clip")
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
        source = data_folder / "tokenizers" / "clip" / name
        if source.is_file():
            (folder / "clip" / name).write_bytes(source.read_bytes())
    (folder / "clip" / "README.md").write_text("---\nlicense: mit\n---\n")
    return folder


@pytest.fixture(scope="module")
def converted(published, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("converted")
    for kind in ("swin", "t5", "clip"):
        main(["convert", "--from", kind, "--source", str(published / kind), "--out", str(folder / kind)])
    return folder


def test_the_note_says_where_weights_come_from(converted, published):
    note = read_note(converted / "clip")
    assert note["kind"] == "clip"
    assert note["source"] == str(published / "clip")
    assert note["licence"] == "mit"
    assert len(note["files"]["model.safetensors"]) == 64
    assert read_note(converted / "t5")["licence"] == "not stated"  # no card lies beside it
    swin = load(converted / "swin", "swin")
    assert note["parameters"] == sum(x.size for x in jax.tree.leaves(load(converted / "clip", "clip").params))
    assert (swin.config["embed_dim"], swin.config["depths"], swin.config["window_size"]) == (16, [1, 2, 1, 1], 4)


def test_a_backbones_norms_are_kept_and_a_classifiers_start_anew(published, tmp_path):
    out = tmp_path / "swin"
    main(["convert", "--from", "swin", "--source", str(published / "backbone"), "--out", str(out)])
    kept = load(out, "swin").params
    theirs = load_file(published / "backbone" / "model.safetensors")
    np.testing.assert_array_equal(kept["norm2"]["scale"], theirs["hidden_states_norms.stage3.weight"])
    main(["convert", "--from", "swin", "--source", str(published / "swin"), "--out", str(tmp_path / "classifier")])
    new = load(tmp_path / "classifier", "swin").params
    assert (np.asarray(new["norm1"]["scale"]) == 1).all()
    assert (np.asarray(new["norm3"]["bias"]) == 0).all()


def test_the_swin_authors_files(published, converted, tmp_path):
    """Their .pth has a classifier, masks and indices beside the weights, all under "model"."""
    ours = load(converted / "swin", "swin").params
    state = {name: torch.from_numpy(np.array(x)) for name, x in AUTHORS_SWIN_RULES.to_theirs(ours).items()}
    state = {name: x for name, x in state.items() if not name.startswith("norm")}
    state |= {"norm.weight": torch.ones(128), "norm.bias": torch.zeros(128), "head.weight": torch.zeros(5, 128)}
    state |= {"head.bias": torch.zeros(5), "layers.1.blocks.1.attn_mask": torch.zeros(4, 16, 16)}
    state["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(16, 16, dtype=torch.int64)
    torch.save({"model": state}, tmp_path / "swin.pth")
    main(["convert", "--from", "swin", "--source", str(tmp_path / "swin.pth"), "--out", str(tmp_path / "out")])
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "out", "swin").params, ours)


@pytest.mark.parametrize("layout", ["swin", "swin_hugging_face"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_swin_there_and_back(converted, tmp_path, layout, suffix):
    file = tmp_path / f"swin{suffix}"
    main(["export", str(converted / "swin"), "--to", layout, "--out", str(file)])
    main(["convert", "--from", "swin", "--source", str(file), "--out", str(tmp_path / "again")])
    want = load(converted / "swin", "swin").params
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "again", "swin").params, want)


def test_t5_there_and_back(converted, tmp_path):
    file = tmp_path / "t5.safetensors"
    main(["export", str(converted / "t5"), "--to", "t5", "--out", str(file)])
    main(["convert", "--from", "t5", "--source", str(file), "--out", str(tmp_path / "again")])
    want = load(converted / "t5", "t5").params
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "again", "t5").params, want)


@pytest.mark.parametrize("tied", [True, False])
def test_a_t5_without_a_head_of_its_own(published, tmp_path, tied):
    """Its head is the embedding; the first T5 (tied) scales what enters it by d^-½."""
    folder = tmp_path / "t5"
    model = T5ForConditionalGeneration(TheirT5Config(**T5 | {"tie_word_embeddings": tied}))
    model.save_pretrained(folder)
    main(["convert", "--from", "t5", "--source", str(folder), "--out", str(tmp_path / "out")])
    params = load(tmp_path / "out", "t5").params
    scale = np.float32(E**-0.5) if model.config.scale_decoder_outputs else np.float32(1)
    np.testing.assert_array_equal(params["lm_head"]["kernel"], np.asarray(params["shared"]["embedding"]).T * scale)
    assert model.config.scale_decoder_outputs == tied


def test_wrong_sources_write_nothing(published, tmp_path):
    (tmp_path / "cut.safetensors").write_bytes((published / "t5" / "model.safetensors").read_bytes()[:500])
    state = load_file(published / "t5" / "model.safetensors")
    del state["encoder.block.0.layer.0.SelfAttention.k.weight"]
    state["stranger"] = np.zeros((2, 3), np.float32)
    save_file(state, tmp_path / "changed.safetensors")
    cases = (
        ("swin", published / "t5", "not a Swin backbone"),
        ("t5", published / "clip", "not a T5"),
        ("clip", published / "swin", "not CLIP's text tower"),
        ("opendet", published / "swin", "not a checkpoint of Open-Det"),
        ("t5", tmp_path / "cut.safetensors", "damaged"),
        ("t5", tmp_path / "changed.safetensors", "stranger (2, 3)"),
        ("t5", tmp_path / "changed.safetensors", "encoder/block_0/layer_0/SelfAttention/k/kernel (32, 32), in theirs"),
    )
    for kind, source, message in cases:
        with pytest.raises(SystemExit) as stopped:
            main(["convert", "--from", kind, "--source", str(source), "--out", str(tmp_path / "out")])
        assert str(stopped.value).startswith("error: ")
        assert message in str(stopped.value)
        assert not (tmp_path / "out").exists()


def test_a_folder_is_never_written_over(converted, published):
    with pytest.raises(SystemExit, match="already holds weights"):
        main(["convert", "--from", "t5", "--source", str(published / "t5"), "--out", str(converted / "t5")])


def test_inspect(published, converted, capsys):
    main(["inspect", str(published / "t5")])
    theirs = capsys.readouterr().out
    assert "encoder.block.0" in theirs
    assert "numbers" in theirs
    main(["inspect", str(converted / "t5"), "--all"])
    ours = capsys.readouterr().out
    assert "shared/embedding  24×32  float32" in ours
    assert "# licence: not stated" in ours
    count = sum(x.size for x in jax.tree.leaves(load(converted / "t5", "t5").params))
    assert f"{count:,} numbers" in ours


def config_for(converted: Path, **init: str) -> Config:
    """The tiny model with the sizes of what was saved above."""
    swin, t5 = (load(converted / kind, kind).config for kind in ("swin", "t5"))
    backbone = SwinConfig(**{key: tuple(x) if isinstance(x, list) else x for key, x in swin.items()})
    sizes = {key: t5[key] for key in ("vocab_size", "num_layers", "num_heads", "head_width", "ffn_width")}
    model = replace(TINY, backbone=backbone, t5=replace(TINY.t5, **sizes))
    return replace(Config(), model=model, init=InitConfig(**{part: str(converted / x) for part, x in init.items()}))


def test_training_starts_from_parts(converted):
    config = config_for(converted, backbone="swin", t5="t5")
    params = init_params(OpenDet(config.model), jax.random.key(0))
    started = flat(initialise(params, config))
    before = flat(params)
    assert set(started) == set(before)
    swin, t5 = (flat(load(converted / kind, kind).params) for kind in ("swin", "t5"))
    for path, value in started.items():
        if path.startswith("backbone/"):
            np.testing.assert_array_equal(value, swin[path.removeprefix("backbone/")])
        elif path.removeprefix("name_generator/t5/") in t5:
            np.testing.assert_array_equal(value, t5[path.removeprefix("name_generator/t5/")])
        else:
            np.testing.assert_array_equal(value, before[path])
    assert "the rest is random" in describe(config)
    assert describe(Config()).startswith("STARTING FROM NOTHING")


def test_training_refuses_parts_of_another_size(converted):
    config = config_for(converted, backbone="swin")
    other = replace(config, model=replace(config.model, backbone=replace(config.model.backbone, depths=(1, 1, 1, 1))))
    params = init_params(OpenDet(config.model), jax.random.key(0))
    with pytest.raises(WeightsError, match=r"depths: the weights \[1, 2, 1, 1\], the config \[1, 1, 1, 1\]"):
        initialise(params, other)
    with pytest.raises(WeightsError, match="kind 't5', not 'swin'"):
        initialise(params, config_for(converted, backbone="t5"))
    with pytest.raises(WeightsError, match="holds no converted weights"):
        initialise(params, config_for(converted, backbone="nowhere"))


def test_names_become_a_table(converted, tmp_path, monkeypatch):
    names = [f"thing {n}" for n in range(150)] + ["bus (vehicle)"]
    (tmp_path / "names.txt").write_text("\n".join(names) + "\n")
    out = tmp_path / "table.npy"
    arguments = ["embed-names", "--names", str(tmp_path / "names.txt"), "--encoder", str(converted / "clip"), "--out"]
    main([*arguments, str(out)])
    table = np.load(out)
    assert table.shape == (151, E)
    np.testing.assert_allclose(np.linalg.norm(table, axis=1), 1.0, rtol=1e-6)
    assert json.loads(out.with_suffix(".json").read_text()) == names
    encoder = load_text_encoder(converted / "clip")
    np.testing.assert_allclose(encoder(["a bus (vehicle)"])[0], table[-1], atol=1e-6)
    assert not list(tmp_path.glob("*.part.*"))

    # Interrupted after the first batch, it goes on with the second.
    resumed = tmp_path / "again.npy"
    calls = []

    def encode(self, texts):
        calls.append(len(texts))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(self, texts)

    original = type(encoder).__call__
    monkeypatch.setattr(type(encoder), "__call__", encode)
    with pytest.raises(KeyboardInterrupt):
        main([*arguments, str(resumed)])
    assert not resumed.exists()
    main([*arguments, str(resumed)])
    assert calls == [64, 64, 64, 23]
    np.testing.assert_array_equal(np.load(resumed), table)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("names.json", '{"images": []}', "those in annotations are read by --annotations"),
        ("names.txt", "\n\n", "none of them empty"),
        ("names.json", '["cat", 3]', "must be a list of names"),
        ("names.json", "[", "cannot be read as names"),
    ],
)
def test_bad_lists_of_names(converted, tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    names, encoder, out = (str(path) for path in (tmp_path / name, converted / "clip", tmp_path / "t.npy"))
    with pytest.raises(SystemExit, match=message):
        main(["embed-names", "--names", names, "--encoder", encoder, "--out", out])
    assert not (tmp_path / "t.npy").exists()


def test_a_whole_model_starts_another(converted, tmp_path, caplog):
    """A training run's newest checkpoint is a whole model too."""
    config = config_for(converted, backbone="swin")
    model = OpenDet(config.model)
    trained, fresh = (init_params(model, jax.random.key(seed)) for seed in (0, 1))
    run = Converted("opendet", config.to_dict(), trained)
    save(tmp_path / "run", run, {"source": "a test"})
    (tmp_path / "run" / "weights.json").unlink()
    started = initialise(fresh, replace(config, init=InitConfig(model=str(tmp_path / "run"))))
    jax.tree.map(np.testing.assert_array_equal, started, trained)
    begun = replace(config, init=InitConfig(model=str(tmp_path / "run")))
    check_start(jax.eval_shape(lambda: fresh), begun)
    assert "begin random" not in caplog.text
    more = fresh | {"denoising": {"label_embedding": {"embedding": np.zeros((2, 4))}}, "new": {"bias": np.zeros(3)}}
    lacking = {name: part for name, part in trained.items() if name != "denoising"}
    save(tmp_path / "lacking", Converted("opendet", config.to_dict(), lacking), {"source": "a test"})
    begun = replace(config, init=InitConfig(model=str(tmp_path / "lacking")))
    check_start(jax.eval_shape(lambda: more), begun)
    assert "lacking has none of 2 parameters, which begin random: denoising/label_embedding" in caplog.text
    other = replace(config, model=replace(config.model, encoder_layers=2), init=InitConfig(model=str(tmp_path / "run")))
    with pytest.raises(WeightsError, match="encoder_layers: the weights 1, the config 2"):
        initialise(fresh, other)


@pytest.fixture(scope="module")
def run(converted, tmp_path_factory) -> Path:
    """A training run's workdir, with low-rank factors that are not zero."""
    config = config_for(converted, backbone="swin")
    params = init_params(OpenDet(config.model), jax.random.key(3))
    t5 = params["name_generator"]["t5"]
    rng = np.random.default_rng(0)
    for name in ("lm_head", "shared"):
        for factor in ("lora_A", "lora_B"):
            t5[name][factor] = np.asarray(rng.standard_normal(t5[name][factor].shape), np.float32)
    folder = tmp_path_factory.mktemp("run")
    save(folder, Converted("opendet", config.to_dict(), params), {})
    (folder / "weights.json").unlink()
    return folder


def test_a_whole_models_t5_leaves_with_its_corrections(run, tmp_path):
    """transformers' T5, which knows no LoRA, gives the logits of ours that has them."""
    file = tmp_path / "t5.safetensors"
    main(["export", str(run), "--to", "t5", "--out", str(file)])
    whole = load(run, "opendet")
    sizes = whole.config["model"]["t5"]
    theirs = T5ForConditionalGeneration(
        TheirT5Config(
            d_model=whole.config["model"]["text_width"],
            d_kv=sizes["head_width"],
            d_ff=sizes["ffn_width"],
            num_layers=sizes["num_layers"],
            num_heads=sizes["num_heads"],
            vocab_size=sizes["vocab_size"],
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
        )
    ).eval()
    theirs.lm_head = torch.nn.Linear(
        E, sizes["vocab_size"], bias=False
    )  # transformers ties it whatever its config says
    theirs.load_state_dict({name: torch.from_numpy(x.copy()) for name, x in load_file(file).items()})
    memory, tokens = np.random.default_rng(1).standard_normal((2, 1, E), np.float32), np.array([[0, 5, 7], [0, 3, 1]])
    model = our_t5.T5(T5Config(**sizes), E, lora=True, dtype=jnp.dtype("float32"))

    def logits(t5: our_t5.T5):
        return t5.head(t5.decode(jnp.asarray(tokens), t5.encode(jnp.asarray(memory)), jnp.asarray(tokens) > -1))

    ours = model.apply({"params": whole.params["name_generator"]["t5"]}, method=logits)
    with torch.no_grad():
        want = theirs(inputs_embeds=torch.from_numpy(memory), decoder_input_ids=torch.from_numpy(tokens)).logits
    np.testing.assert_allclose(ours, want.numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_whole_model_leaves_under_the_authors_names(run, tmp_path, suffix):
    file = tmp_path / f"model{suffix}"
    main(["export", str(run), "--to", "opendet", "--out", str(file)])
    params = load(run, "opendet").params
    back = OPENDET_RULES.to_ours(read_source(str(file)).state, shapes_of(params))
    jax.tree.map(np.testing.assert_array_equal, back, params)
