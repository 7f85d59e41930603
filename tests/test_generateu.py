"""GenerateU as a config (docs/generateu.md): exactly what its table says, a training run, and published weights."""

import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import opendet_jax
from configs import generateu_t, generateu_tiny, scenes_tiny, swin_t
from opendet_jax.config import Ablation, Config, ConfigError, SwinConfig, T5Config
from opendet_jax.config_files import parse_config
from opendet_jax.data.scene_drawing import draw_scene
from opendet_jax.errors import WeightsError
from opendet_jax.losses.matching import ONE_TO_ONE
from opendet_jax.losses.total import clean_targets, matching_sets
from opendet_jax.train.training_loop import train
from opendet_jax.weights.convert import convert, export, swin_shapes, t5_shapes
from opendet_jax.weights.rules import nested
from opendet_jax.weights.source import Source
from tests.golden.parameters import FOLDER
from tests.losses import examples
from tests.reliability import tiny

STEPS, QUERIES = 40, 8


def differences(config: Config, other: Config) -> dict[str, object]:
    """Fields of `config` that `other` has otherwise, by their dotted names."""
    fields, others = (flatten_dict(asdict(x), sep=".") for x in (config, other))
    return {name: value for name, value in fields.items() if others[name] != value}


@pytest.mark.parametrize(
    ("ours", "theirs", "queries", "fields"),
    [
        (generateu_t, swin_t, 300, {"name": "generateu_t", "model.max_queries": 300}),
        (generateu_tiny, scenes_tiny, 32, {"name": "generateu_tiny", "model.min_queries": 32}),
    ],
)
def test_what_differs_from_open_det(ours, theirs, queries, fields):
    """Every switch of the table, and nothing else. scenes_tiny has normalised prompts in any case."""
    ablations = ("object_detector", "aligner", "l_to_v", "distiller", "lora_head")
    ablations += ("text_denoising", "masked_alignment", "joint_loss")
    want: dict[str, object] = {f"ablation.{switch}": False for switch in ablations}
    want |= {"model.denoising_queries": 0, **fields}
    config, other = parse_config(ours.get_config()), parse_config(theirs.get_config())
    if not other.model.normalise_prompts_at_inference:
        want["model.normalise_prompts_at_inference"] = True
    assert differences(config, other) == want
    assert (config.model.min_queries, config.model.max_queries) == (queries, queries)
    assert config.model.normalise_prompts_at_inference
    assert {switch for switch, on in asdict(config.ablation).items() if on} == {"train_llm"}


def test_variants():
    plain, published = (parse_config(generateu_t.get_config(variant)) for variant in ("", "published"))
    assert differences(published, plain) == {
        "name": "generateu_t_published",
        "model.backbone.drop_path_rate": 0.3,
        "data.batch_size": 64,
        "optimizer.detector_rate": 2e-4,
        "optimizer.backbone_rate": 2e-5,
        "optimizer.generator_rate": 3e-4,
        "optimizer.decay_steps": (160_000,),
        "train.steps": 180_000,
    }
    assert round(published.train.steps * published.data.batch_size / 77_398) == 149  # epochs, as in the paper's table 1
    scenes = parse_config(generateu_t.get_config("scenes"))
    assert (scenes.data.source, scenes.model, scenes.ablation) == ("scenes", plain.model, plain.ablation)
    with pytest.raises(ConfigError, match=r"configs/generateu_t\.py:scene does not exist"):
        generateu_t.get_config("scene")


def listed(name: str) -> set[str]:
    """The parameters' paths in a golden file, which tests/test_shapes.py holds to."""
    lines = (FOLDER / f"{name}.txt").read_text().splitlines()
    return {line.split()[0] for line in lines if not line.startswith("#")}


def test_parameters():
    paths = listed("generateu_t")
    new = {"distiller/projection/kernel", "distiller/projection/bias"}
    # The first four layers of Open-Det have no self-attention.
    added = {path for path in paths if path.split("/")[1] in {f"layers_{n}" for n in range(4)}} - listed("swin_t")
    assert {path.split("/")[2] for path in added} == {"self_attn", "norm2"}
    assert paths - listed("swin_t") == new | added
    assert {path for path in paths if path.startswith("distiller/")} == new
    layers = {path.split("/")[1] for path in paths if path.startswith("decoder/") and "/self_attn/" in path}
    assert layers == {f"layers_{n}" for n in range(6)}
    for absent in ("lora", "self_attn3", "ffn3", "denoising", "one_to_many", "refine", "l_to_v"):
        assert not any(absent in path for path in paths), absent
    groups = [line.split()[2] for line in (FOLDER / "generateu_t.txt").read_text().splitlines() if line[0] != "#"]
    assert set(groups) == {"backbone", "detector", "generator"}  # nothing is frozen


def test_every_layer_is_matched_one_to_one():
    rng = np.random.default_rng(0)
    objects = examples.objects(rng)
    training = examples.training(rng, objects.valid)
    ablation = Ablation(object_detector=False)
    [(mode, (names, _))] = matching_sets(training, clean_targets(objects), examples.CONFIG, ablation).items()
    assert mode == ONE_TO_ONE
    assert names == ["layer_1", "layer_2", "layer_3", "layer_4", "encoder"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run on two scenes, the same two at every step."""
    workdir = tmp_path_factory.mktemp("generateu")
    config = generateu_t.as_generateu(tiny.get_config(), QUERIES)
    config.data.update(scenes_train=2, flip_probability=0.0, max_objects=8)
    config.train.update(steps=STEPS, checkpoint_every=0)
    config.optimizer.update(detector_rate=3e-3, backbone_rate=3e-3, generator_rate=3e-3)
    train(parse_config(config), workdir)
    return workdir


def test_it_trains(trained):
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert all(math.isfinite(value) for row in rows for value in row.values())
    others = {"step", "gradient_norm"}
    terms = {name for name in rows[0] if not name.startswith("learning_rate/")} - others
    sets = ("layer_1", "layer_2", "encoder")
    assert terms == {
        "naming",
        "total",
        *(f"{term}/{name}" for term in ("l1", "giou", "focal", "alignment") for name in sets),
    }
    falling = ("total", "naming", *(f"{term}/layer_2" for term in ("l1", "giou", "focal", "alignment")))
    changes = {name: rows[-1][name] / rows[0][name] for name in falling}
    assert all(change < 0.8 for change in changes.values()), changes


def test_it_is_evaluated_and_predicts(trained):
    scores = json.loads((trained / "eval/scenes/metrics.json").read_text())
    assert (scores["images"], scores["step"]) == (2, STEPS)
    assert all(math.isfinite(scores[name]) for name in ("AP", "agnostic_AP"))
    picture, _ = draw_scene(seed=0, split="val", index=0, size=32)
    found = opendet_jax.load(str(trained)).detect(picture, min_score=0.0, nms_iou=1.0)
    assert len(found) == QUERIES  # whatever they score
    assert all(isinstance(name, str) for name in found.names)


def published_names(rng) -> dict[str, np.ndarray]:
    """A little Swin and T5 as GenerateU's program names them: read in its source, docs/generateu.md."""

    def drawn(shapes):
        return nested({path: rng.normal(size=shape).astype("f4") for path, shape in shapes.items()})

    swin = SwinConfig(embed_dim=8, depths=(1, 2, 1, 1), num_heads=(1, 2, 4, 8), window_size=2)
    t5 = T5Config(vocab_size=24, num_layers=1, num_heads=2, head_width=8, ffn_width=16)
    before = {"swin": "detr.detr.backbone.0.backbone.", "t5": "detr.detr.class_generate.t5_model."}
    state = {}
    for kind, shapes in (("swin", swin_shapes(swin)), ("t5", t5_shapes(t5, 16))):
        state |= {before[kind] + name: value for name, value in export(drawn(shapes), kind).items()}
    for kind in ("weight", "bias"):
        state[f"{before['swin']}norm0.{kind}"] = np.ones(8, "f4")
    state[f"{before['t5']}temp"] = np.array(0.07, "f4")
    state["detr.detr.class_generate.t5_proj.weight"] = np.ones((16, 32), "f4")
    state["detr.detr.transformer.pos_trans.weight"] = np.ones((64, 64), "f4")
    return state


@pytest.mark.parametrize(("kind", "unused"), [("swin", "the norm of the first stage"), ("t5", "never uses")])
def test_its_swin_and_t5_convert(kind, unused):
    state = published_names(np.random.default_rng(0))
    found = convert(kind, Source("vg_swinT.pth", (), state, {}, ""))
    mark = {"swin": "backbone.0.backbone.", "t5": "t5_model."}[kind]
    own = {name.partition(mark)[2]: value for name, value in state.items() if mark in name}
    exported = export(found.converted.params, kind)
    assert set(exported) == set(own) - {"norm0.weight", "norm0.bias", "temp"}
    for name, value in exported.items():
        np.testing.assert_array_equal(value, own[name])
    assert any(unused in why for why in found.left_out)


def test_the_whole_is_refused():
    """Its decoder is another one: nothing is filled in halfway."""
    with pytest.raises(WeightsError, match=r"not a Swin backbone: .* among its 120 names"):
        convert("opendet", Source("vg_swinT.pth", (), published_names(np.random.default_rng(0)), {}, ""))
