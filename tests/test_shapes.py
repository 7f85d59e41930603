"""Every shipped config at its full size, by shapes alone: training step, detection, names, and all its parameters."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import jaxtyping
import pytest

from opendet_jax.batch import Batch, Images, Objects
from opendet_jax.model.opendet import OpenDet, init_params
from opendet_jax.train.optimizer import TrainState, make_optimizer
from opendet_jax.train.step import make_train_step
from tests.golden.parameters import CONFIGS, FOLDER, shipped, table


@pytest.fixture(autouse=True)
def abstract():
    """eval_shape passes shapes through our dataclasses, whose fields otherwise insist on arrays."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_those_of_the_golden_file(name):
    assert table(shipped(name)) == (FOLDER / f"{name}.txt").read_text(), "if this is meant: make golden"


# Half a minute each; but for its backbone each of these is swin_t.
LARGER = "swin_s", "swin_l"


@pytest.mark.parametrize("name", LARGER)
def test_only_the_backbone_is_larger(name):
    larger, config = shipped(name), shipped("swin_t")
    model = replace(larger.model, backbone=config.model.backbone)
    assert replace(larger, name="swin_t", model=model) == config


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LARGER)) for name in CONFIGS])
def test_every_stage_builds_at_full_size(name):
    config = shipped(name)
    model, data = OpenDet(config.model, config.ablation), config.data
    batch, (height, width), objects = data.batch_size, data.buckets[0], data.max_objects
    of = jax.ShapeDtypeStruct
    images = Images(pixels=of((batch, height, width, 3), jnp.uint8), mask=of((batch, height, width), bool))
    boxes = Objects(
        boxes=of((batch, objects, 4), jnp.float32),
        valid=of((batch, objects), bool),
        texts=of((batch, objects, config.model.text_width), jnp.float32),
        tokens=of((batch, objects, data.max_name_tokens), jnp.int32),
    )
    optimizer = make_optimizer(config.optimizer, config.ablation)

    def initial(key) -> TrainState:
        params = init_params(model, key)
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    state = jax.eval_shape(initial, jax.random.key(0))
    after, terms = jax.eval_shape(make_train_step(model, optimizer, config), state, Batch(images, boxes))
    shapes = partial(jax.tree.map, lambda x: (x.shape, x.dtype))
    assert shapes(after) == shapes(state)
    layers = config.model.one_to_many_layers + config.model.one_to_one_layers
    assert {f"giou/layer_{n + 1}" for n in range(layers)} < set(terms)
    of_switches = {
        "text_denoising": config.ablation.text_denoising,
        f"distillation/layer_{layers}": config.ablation.distiller,
        f"joint/layer_{layers}": config.ablation.joint_loss,
        f"giou/denoising_{layers}": config.model.denoising_queries > 0,
    }
    assert {"naming", "total"} < set(terms)
    assert {name for name in of_switches if name in terms} == {name for name, on in of_switches.items() if on}
    assert terms.pop("refused").dtype == jnp.int32  # a count
    assert all(term.shape == () and term.dtype == jnp.float32 for term in terms.values())

    params = {"params": state.params}
    detected = jax.eval_shape(partial(model.apply, method="detect"), params, images)
    queries = config.model.max_queries
    assert detected.decoded.boxes.shape == (layers, batch, queries, 4)
    assert detected.prompts.shape == (batch, queries, config.model.text_width)
    beams, tokens = config.eval.num_beams, config.eval.max_new_tokens
    names = jax.eval_shape(
        lambda p, prompts: model.apply(p, prompts, beams, tokens, method="generate"),
        params,
        of((5, config.model.text_width), jnp.float32),
    )
    assert names.tokens.shape == (5, beams, 1 + tokens)
    assert names.scores.shape == (5, beams)
