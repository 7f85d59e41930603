"""Inference in two halves: the number of selected queries chooses the size of the second."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import jax
import numpy as np
import pytest

from opendet_jax.config import Config, EvalConfig
from opendet_jax.inference import Inference, Selection, slots_for
from opendet_jax.model.opendet import OpenDet

SHORT = EvalConfig(num_beams=2, max_new_tokens=3)


@pytest.mark.parametrize(
    ("used", "slots", "chosen"),
    [
        (0, 900, 100), (1, 900, 100), (100, 900, 100), (101, 900, 300), (300, 900, 300), (301, 900, 900),
        (900, 900, 900), (5, 24, 24), (24, 24, 24), (120, 300, 300), (99, 300, 100), (101, 200, 200),
    ],
)  # fmt: skip
def test_the_batch_chooses_its_slots(used, slots, chosen):
    valid = np.zeros((2, slots), bool)
    valid[1, :used] = True
    assert slots_for(valid, (100, 300)) == chosen


def test_few_slots_give_what_all_slots_give_and_compile_once(tiny, tiny_params, tiny_images):
    model = OpenDet(replace(tiny, score_threshold=0.5))
    configs = (Config(model=model.config, eval=replace(SHORT, query_slots=sizes)) for sizes in ((), (8, 16)))
    everything = Selection(max_detections=100, min_score=0.0, nms_iou=0.9, nms_above=300)
    whole, split = (Inference(model, tiny_params, config, str) for config in configs)
    slots = []
    for bias in (-9.0, 9.0, -9.0, 9.0):  # of the score: no token is an object, all are, …
        score = tiny_params["query_selection"]["score"]
        score = {**score, "bias": np.full_like(score["bias"], bias)}
        params = {**tiny_params, "query_selection": {**tiny_params["query_selection"], "score": score}}
        whole.params = split.params = jax.device_put(params)
        want = whole(tiny_images, [(64, 96), (48, 64)], everything)
        got = split(tiny_images, [(64, 96), (48, 64)], everything)
        valid = split._encode(split.params, split.place(tiny_images))[-1].valid
        slots.append(slots_for(np.asarray(valid), split.config.eval.query_slots))
        for ours, theirs in zip(got, want, strict=True):
            np.testing.assert_allclose(ours.boxes, theirs.boxes, atol=1e-3)
            np.testing.assert_allclose(ours.scores, theirs.scores, atol=1e-5)
            assert ours.names == theirs.names
    assert slots == [8, 24, 8, 24]
    assert (whole._decode_queries.count(), split._decode_queries.count()) == (1, 2)
    assert (split._encode.count(), split._generate.count()) == (1, 2)  # names: chunks of 30 and of 100


def test_photographs_of_a_bucket_and_settings_compile_nothing_more(tiny, tiny_params, tiny_images):
    inference = Inference(OpenDet(tiny), tiny_params, Config(model=tiny, eval=SHORT), str)
    compiled = []

    def count(event: str, _seconds: float, **_) -> None:
        compiled.extend([event] * (event == "/jax/core/compile/backend_compile_duration"))

    jax.monitoring.register_event_duration_secs_listener(count)
    rng, after = np.random.default_rng(0), []
    shape = tiny_images.pixels.shape
    for number in range(5):
        photographs = replace(tiny_images, pixels=rng.integers(0, 256, shape, np.uint8))
        selection = Selection(max_detections=5 - number, min_score=number / 100, nms_iou=0.9 - number / 10)
        found = inference(photographs, [(64 + number, 96), (48, 64 - number)], selection)
        assert [len(one.scores) for one in found] == [5 - number] * 2
        after.append(len(compiled))
    assert after[0] > 0
    assert after == [after[0]] * 5


def test_programs_hold_nothing_of_the_config_but_what_they_are_known_by(tiny, tiny_params, tiny_images):
    """On disk they are known by the model and the number of beams (inference.py); more would be an AttributeError."""
    inference = Inference(OpenDet(tiny), tiny_params, Config(model=tiny, eval=SHORT), str)
    inference.config = cast(Any, SimpleNamespace(eval=SimpleNamespace(num_beams=SHORT.num_beams)))
    given = np.zeros((4, tiny.text_width), np.float32)

    def both_halves(params, images, asked):
        return jax.tree.leaves(inference._second_half(params, asked, inference._first_half(params, images), slots=8))

    for texts in (None, given):
        jax.eval_shape(both_halves, tiny_params, tiny_images, ((0.9, 300), texts))
    tokens, scores = jax.eval_shape(lambda *x: inference._names(*x, None, 3), tiny_params, given)
    assert tokens.shape[:2] == scores.shape == (len(given), SHORT.num_beams)
