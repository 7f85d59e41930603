"""One optimizer step of the whole model: what it changes, what it leaves alone, and that it can be repeated."""

import re
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from opendet_jax.batch import Batch, Images, Objects
from opendet_jax.config import Ablation, Config
from opendet_jax.model.opendet import OpenDet, init_params
from opendet_jax.parallel.mesh import make_mesh, place_batch
from opendet_jax.parallel.sharding import partition
from opendet_jax.train import step as step_module
from opendet_jax.train.optimizer import TrainState, fresh_state, make_optimizer
from opendet_jax.train.step import jit_step, make_train_step, step_gradients
from tests.model.conftest import SHALLOW

RATES = dict.fromkeys(("detector_rate", "backbone_rate", "generator_rate"), 3e-3)  # at which 40 steps are enough
CONFIG = replace(Config(), model=SHALLOW, optimizer=replace(Config().optimizer, **RATES))


@pytest.fixture(scope="module")
def batch() -> Batch:
    """Three images: two objects, four, and none."""
    rng = np.random.default_rng(0)
    mask = np.ones((3, 64, 64), bool)
    mask[1, :, 48:] = False
    valid = np.arange(4) < np.array([[2], [4], [0]])
    texts = rng.normal(size=(3, 4, 32)).astype(np.float32)
    texts /= np.linalg.norm(texts, axis=-1, keepdims=True)
    boxes = np.concatenate([rng.uniform(0.3, 0.7, (3, 4, 2)), rng.uniform(0.1, 0.4, (3, 4, 2))], axis=-1)
    tokens = np.where(valid[..., None], np.array([5, 9, 1, 0]), 0).astype(np.int32)
    pixels = rng.integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    return Batch(Images(pixels, mask), Objects(boxes.astype(np.float32), valid, texts, tokens))


@cache
def program(config: Config):
    """What makes the state of step 0, and the step, which is compiled once."""
    model, optimizer = OpenDet(config.model, config.ablation), make_optimizer(config.optimizer, config.ablation)

    def fresh() -> TrainState:
        params = init_params(model, jax.random.key(0))
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    return fresh, jax.jit(make_train_step(model, optimizer, config))


def run(config: Config, batch: Batch, steps: int) -> tuple[dict, dict, list[dict[str, float]]]:
    """(parameters before, parameters after two steps, terms of each step), flat by path."""
    fresh, step = program(config)
    state, terms, after = fresh(), [], {}
    params = state.params
    for number in range(steps):
        state, values = step(state, batch)
        terms.append({name: float(value) for name, value in values.items()})
        assert int(state.step) == number + 1
        if number == 1:
            after = jax.device_get(state.params)
    return flatten_dict(jax.device_get(params)), flatten_dict(after), terms


@pytest.fixture(scope="module")
def default(batch):
    return run(CONFIG, batch, 40)


def test_everything_moves_but_what_is_frozen(default):
    """By default T5's head and embedding stay to the last bit, and their LoRA factors learn in their place."""
    before, after, _ = default
    same = {path for path in before if np.array_equal(before[path], after[path])}
    # Zero and without a gradient: decay leaves them at zero. The first is multiplied by a zero factor at the start.
    t5 = ("name_generator", "t5")
    assert {(*t5, "lm_head", "kernel"), (*t5, "shared", "embedding")} <= same
    assert (*t5, "lm_head", "lora_B") not in same
    assert (*t5, "shared", "lora_A") not in same
    allowed = {(*t5, "lm_head", "kernel"), (*t5, "shared", "embedding")}
    assert all((before[path] == 0).all() for path in same - allowed), same - allowed


def test_the_same_seed_gives_the_same_bits(default, batch):
    _, after, terms = run(CONFIG, batch, 2)
    assert terms == default[2][:2]
    for path, value in default[1].items():
        np.testing.assert_array_equal(after[path], value)


def test_the_same_config_gives_the_same_program(batch):
    """Traced once more: nothing but config and shapes decides what is computed."""
    texts = []
    for _ in range(2):
        fresh, step = program.__wrapped__(CONFIG)
        texts.append(re.sub(r" at 0x[0-9a-f]+", "", str(jax.make_jaxpr(step)(jax.eval_shape(fresh), batch))))
    assert texts[0] == texts[1]


def test_randomness_depends_on_seed_and_step(default, batch, monkeypatch):
    """And on nothing else: what the key that the losses get draws."""
    terms = default[2]
    assert terms[0]["text_denoising"] != terms[1]["text_denoising"]

    def draws(_model, _config):
        return lambda params, batch, key: (params["x"], {"drawn": jax.random.uniform(key)})

    monkeypatch.setattr(step_module, "loss_function", draws)

    def drawn(seed: int, step: int) -> float:
        config = replace(CONFIG, train=replace(CONFIG.train, seed=seed))
        gradients = step_gradients(OpenDet(CONFIG.model), config)
        return float(gradients({"x": jnp.zeros(())}, batch, jnp.int32(step))[0]["drawn"])

    places = [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert len({drawn(*place) for place in places}) == 4
    assert drawn(1, 1) == drawn(1, 1)


def test_all_ablations_at_once(batch):
    """The plainest model: trains, has only the terms that are left, and of T5 only the head moves."""
    names = ("object_detector", "aligner", "l_to_v", "distiller", "lora_head")
    names += ("text_denoising", "masked_alignment", "joint_loss")
    ablation = Ablation(**dict.fromkeys(names, False), train_llm=False)
    before, after, terms = run(replace(CONFIG, ablation=ablation), batch, 2)
    kinds = {name.partition("/")[0] for name in terms[0]}
    assert kinds == {"total", "l1", "giou", "focal", "alignment", "naming", "gradient_norm", "refused"}
    assert all(np.isfinite(value) for values in terms for value in values.values())
    moved = {path for path in before if path[0] == "name_generator" and not np.array_equal(before[path], after[path])}
    assert moved == {("name_generator", "t5", "lm_head", "kernel")}
    assert not any("lora" in path[-1] for path in before)


@pytest.mark.parametrize("fields", [{}, {"remat": True}, {"remat": True, "remat_keeps": "products"}])
def test_bfloat16_is_for_activations_alone(batch, monkeypatch, fields):
    """Traced, not run: gradients, parameters, moments and every loss term stay float32."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # shapes stand in the place of arrays
    config = replace(CONFIG, model=replace(SHALLOW, dtype="bfloat16", **fields))
    model, optimizer = OpenDet(config.model, config.ablation), make_optimizer(config.optimizer, config.ablation)
    gradients = []

    def update(updates, state, params=None, **given):
        gradients.extend(leaf.dtype for leaf in jax.tree.leaves(updates))
        return optimizer.update(updates, state, params, **given)

    params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    state = jax.eval_shape(lambda params: fresh_state(params, optimizer, config), params)
    noting = optax.GradientTransformationExtraArgs(optimizer.init, update)
    jaxpr, (new, terms) = jax.make_jaxpr(make_train_step(model, noting, config), return_shape=True)(state, batch)
    floats = [leaf.dtype for leaf in jax.tree.leaves((state, new, terms)) if leaf.dtype.kind == "f"]
    assert {*floats, *gradients} == {jnp.float32.dtype}
    assert len(gradients) == len(jax.tree.leaves(params))
    assert str(jaxpr).count("bf16[") > 1000


def test_the_old_state_is_used_up():
    """Donated: the new one takes its memory."""
    mesh = make_mesh(CONFIG.mesh, jax.devices()[:1])
    params = {"weight": jnp.ones((4, 4)), "bias": jnp.ones(4)}
    state = TrainState(jnp.zeros((), jnp.int32), params, {"momentum": jax.tree.map(jnp.zeros_like, params)})

    def step(state, batch):
        moved = jax.tree.map(lambda x: x + batch.sum(), state.params)
        return state.replace(step=state.step + 1, params=moved), {"total": batch.sum()}

    program = jit_step(step, state, mesh)
    with jax.set_mesh(mesh):
        new, _ = program(jax.device_put(state, partition(state, mesh)), place_batch(np.ones((2, 3), np.float32), mesh))
        last, _ = program(new, place_batch(np.ones((2, 3), np.float32), mesh))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((new.params, new.opt_state)))
    assert float(last.params["bias"][0]) == 13


def test_losses_fall_on_one_batch(default):
    first, last = default[2][0], default[2][-1]
    for name in ("l1/layer_2", "giou/layer_2", "focal/layer_2", "alignment/layer_1", "distillation/layer_2", "naming"):
        assert last[name] < 0.8 * first[name], f"{name}: {first[name]} → {last[name]}"
