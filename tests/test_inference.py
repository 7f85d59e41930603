"""Which detections are kept and named, with a model whose outputs are its parameters."""

import gc
import weakref
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from configs.scenes_tiny import get_config
from opendet_jax.batch import Images
from opendet_jax.config import Config, EvalConfig
from opendet_jax.config_files import parse_config
from opendet_jax.given_names import AlignedNames
from opendet_jax.inference import Inference, Selection
from opendet_jax.model.opendet import OpenDet, init_params
from tests.stand_ins import encoded

BEAMS, NEW_TOKENS = 2, 3
CONFIG = Config(eval=EvalConfig(num_beams=BEAMS, max_new_tokens=NEW_TOKENS, naming_chunks=(2, 4)))


class Scripted(nn.Module):
    """Says what its parameters say; the prompt of a query is (image number, query number)."""

    @nn.compact
    def encode(self, images, deterministic):
        boxes, logits, valid = (
            self.variable("params", name, lambda: None).value for name in ("boxes", "logits", "valid")
        )
        return encoded(boxes, logits, valid)

    def decode(self, features, memory, queries):
        boxes, logits, valid = queries.boxes, queries.objectness, queries.valid
        batch, queries = logits.shape
        prompts = jnp.stack(jnp.meshgrid(jnp.arange(batch), jnp.arange(queries), indexing="ij"), -1)
        decoded = SimpleNamespace(boxes=jnp.stack([boxes * 0, boxes]), objectness=jnp.stack([logits * 0, logits]))
        return SimpleNamespace(
            decoded=decoded, queries=SimpleNamespace(valid=valid), prompts=prompts.astype(jnp.float32)
        )

    def generate(self, prompts, num_beams, max_new_tokens, trie):
        rows = prompts[:, None, :].astype(jnp.int32)
        beams = jnp.broadcast_to(jnp.arange(num_beams)[:, None], (num_beams, 1))
        tokens = jnp.concatenate(
            [jnp.broadcast_to(x, (len(prompts), num_beams, x.shape[-1])) for x in (rows, beams)], axis=-1
        )
        tokens = jnp.pad(tokens, ((0, 0), (0, 0), (0, 1 + max_new_tokens - tokens.shape[-1])))
        return SimpleNamespace(tokens=tokens, scores=-jnp.ones((len(prompts), num_beams)) - jnp.arange(num_beams))


def decode(tokens):
    assert tokens.shape == (1 + NEW_TOKENS,)
    image, query, beam = tokens[:3]
    return f"image {image} query {query} beam {beam}"


def scripted(boxes, logits, valid=None, config=CONFIG):
    logits = np.asarray(logits, np.float32)
    valid = np.ones(logits.shape, bool) if valid is None else np.asarray(valid)
    return Inference(
        Scripted(), {"boxes": np.asarray(boxes, np.float32), "logits": logits, "valid": valid}, config, decode
    )


def images(batch):
    return Images(np.zeros((batch, 32, 32, 3), np.uint8), np.ones((batch, 32, 32), bool))


EVERYTHING = Selection(max_detections=100, min_score=0.0, nms_iou=0.9, nms_above=300)


def spread(batch, queries, seed=0):
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.uniform(0, 1, (batch, queries, 2)), rng.uniform(0.01, 0.4, (batch, queries, 2))], -1)


def test_boxes_are_pixels_of_the_original_image_and_clipped_to_it():
    found = scripted([[[0.5, 0.5, 0.5, 0.25], [0.9, 0.1, 0.4, 0.4]]], [[0.0, -1.0]])(
        images(1), [(100, 200)], EVERYTHING
    )
    assert len(found) == 1
    np.testing.assert_allclose(found[0].boxes, [[50, 37.5, 150, 62.5], [140, 0, 200, 30]], rtol=1e-6)
    np.testing.assert_allclose(found[0].scores, [0.5, 1 / (1 + np.e)], rtol=1e-6)
    assert found[0].names[1] == ["image 0 query 1 beam 0", "image 0 query 1 beam 1"]
    np.testing.assert_array_equal(found[0].name_scores, [[-1, -2]] * 2)


def test_sorted_by_score_over_several_chunks_and_images():
    boxes, logits = spread(3, 7), np.random.default_rng(1).normal(size=(3, 7))
    found = scripted(boxes, logits)(images(3), [(10, 10)] * 3, EVERYTHING)
    for image, one in enumerate(found):
        order = np.argsort(-logits[image])
        assert [names[0] for names in one.names] == [f"image {image} query {query} beam 0" for query in order]
        assert (np.diff(one.scores) <= 0).all()
        assert one.boxes.shape == (7, 4)
        assert one.name_scores.shape == (7, BEAMS)


def test_a_program_for_each_size_of_chunk_names_any_number_of_prompts():
    inference = scripted(spread(1, 2), [[1.0, 0.0]])
    for rows in range(10):
        prompts = np.stack([np.zeros(rows), np.arange(rows)], axis=-1).astype(np.float32)
        names, scores = inference.name(prompts)
        assert [beams[0] for beams in names] == [f"image 0 query {row} beam 0" for row in range(rows)]
        assert scores.shape == (rows, BEAMS)
    assert inference._generate.count() == 2


def test_only_the_best_valid_ones_are_kept():
    logits = [[3.0, 2.0, 1.0, 0.0, -3.0]]
    valid = [[True, False, True, True, True]]
    kept = Selection(max_detections=2, min_score=0.1, nms_iou=0.9)
    found = scripted(spread(1, 5), logits, valid)(images(1), [(10, 10)], kept)[0]
    assert [names[0].split()[3] for names in found.names] == ["0", "2"]
    many = Selection(max_detections=10, min_score=0.1, nms_iou=0.9)
    found = scripted(spread(1, 5), logits, valid)(images(1), [(10, 10)], many)[0]
    assert [names[0].split()[3] for names in found.names] == ["0", "2", "3"]


def test_only_what_is_kept_is_named(monkeypatch):
    inference = scripted(spread(2, 9), np.random.default_rng(1).normal(size=(2, 9)))
    named, generate = [], inference._generate

    def count(params, prompts, *rest, **limits):
        named.append(len(prompts))
        return generate(params, prompts, *rest, **limits)

    monkeypatch.setattr(inference, "_generate", count)
    for most, calls in ((1, [2]), (2, [4]), (3, [4, 2]), (9, [4] * 4 + [2])):
        named.clear()
        found = inference(images(2), [(10, 10)] * 2, Selection(most, min_score=0.0, nms_iou=1.0))
        assert [len(one.names) for one in found] == [most, most]
        assert named == calls


def test_what_fills_the_batch_up_is_dropped():
    boxes, logits = spread(3, 6), np.random.default_rng(1).normal(size=(3, 6))
    full = scripted(boxes, logits)(images(3), [(10, 20), (30, 10)], EVERYTHING)
    boxes[2], logits[2] = 0.5, 50.0
    assert len(full) == 2
    for a, b in zip(full, scripted(boxes, logits)(images(3), [(10, 20), (30, 10)], EVERYTHING), strict=True):
        jax.tree.map(np.testing.assert_array_equal, vars(a), vars(b))


def test_suppression_depends_on_the_number_of_valid_queries():
    boxes = np.full((2, 4, 4), 0.5)
    valid = [[True] * 4, [True, True, False, False]]
    inference = scripted(boxes, [[0.0, 3.0, 2.0, 1.0]] * 2, valid)
    counts = {}
    for above in (0, 3, 4):
        selection = Selection(max_detections=100, min_score=0.0, nms_iou=0.9, nms_above=above)
        counts[above] = [len(found.scores) for found in inference(images(2), [(10, 10)] * 2, selection)]
    assert counts == {0: [1, 1], 3: [1, 2], 4: [4, 2]}


def test_nothing_found():
    found = scripted(spread(2, 3), np.zeros((2, 3)), np.zeros((2, 3), bool))(images(2), [(10, 10)] * 2, EVERYTHING)
    for one in found:
        assert one.boxes.shape == (0, 4)
        assert one.name_scores.shape == (0, BEAMS)
        assert one.names == []


def test_parameters_may_be_replaced():
    inference = scripted(spread(1, 3), [[0.0, 1.0, 2.0]])
    inference(images(1), [(10, 10)], EVERYTHING)
    inference.params = {**inference.params, "logits": np.array([[2.0, 1.0, 0.0]], np.float32)}
    found = inference(images(1), [(10, 10)], EVERYTHING)[0]
    assert [names[0].split()[3] for names in found.names] == ["0", "1", "2"]
    assert inference._encode.count() == inference._decode_queries.count() == 1

    held = weakref.ref(inference.params["logits"])
    inference.params = None  # training has no room for them
    gc.collect()
    assert held() is None


class Agreeing(Scripted):
    """Agrees with the names in their order."""

    def agree(self, detected, memory, texts):
        logits = jnp.broadcast_to(
            -jnp.arange(texts.shape[1], dtype=jnp.float32), (*detected.prompts.shape[:2], texts.shape[1])
        )
        return SimpleNamespace(logits=logits)


def test_fewer_given_names_than_beams():
    """The rows of zeros that fill the names up are no names."""
    config = replace(CONFIG, eval=replace(CONFIG.eval, num_beams=4))
    params = {"boxes": spread(1, 2), "logits": np.array([[2.0, 0.0]]), "valid": np.ones((1, 2), bool)}
    inference = Inference(Agreeing(), params, config, decode)
    given = AlignedNames(("a", "b", "c"), np.eye(4, 8, dtype=np.float32) * np.array([[1], [1], [1], [0]], np.float32))
    [found] = inference(images(1), [(10, 10)], EVERYTHING, given)
    assert found.names == [["a", "b", "c"]] * 2
    probabilities = 1 / (1 + np.exp([0.0, 1.0, 2.0]))
    np.testing.assert_allclose(np.exp(found.name_scores[:, :3]), [probabilities] * 2, rtol=1e-5)
    assert (found.name_scores[:, 3] == -np.inf).all()
    np.testing.assert_allclose(found.scores, [0.5 / (1 + np.exp(-2.0)), 0.25], rtol=1e-5)


def test_a_score_that_is_no_number_takes_no_name_away():
    class Broken(Scripted):
        def generate(self, *arguments):
            return SimpleNamespace(tokens=super().generate(*arguments).tokens, scores=jnp.full((2, BEAMS), jnp.nan))

    params = {"boxes": spread(1, 1), "logits": np.zeros((1, 1)), "valid": np.ones((1, 1), bool)}
    [found] = Inference(Broken(), params, CONFIG, decode)(images(1), [(10, 10)], EVERYTHING)
    assert found.names == [["image 0 query 0 beam 0", "image 0 query 0 beam 1"]]


def test_a_cpu_is_given_no_more_images_at_a_time_than_its_cache_holds(monkeypatch):
    """Parts are equal, what only fills the batch up is left out, and all is as of each image alone."""
    rows = []

    class Counting(Scripted):
        @nn.compact
        def encode(self, images, deterministic):
            rows.append(len(images.pixels))
            shift = images.pixels[:, 0, 0].astype(jnp.float32)  # [B, 3]: says which image it is
            boxes = jnp.broadcast_to(jnp.full(4, 0.5), (*shift.shape, 4)) - shift[..., None] / 100
            valid = jnp.stack([shift[:, 0] >= 0, shift[:, 1] >= 0, shift[:, 2] > 5], axis=1)
            return encoded(boxes, shift, valid)

    monkeypatch.setattr("opendet_jax.inference.CACHED", 3 * 32 * 32 + 1)
    pixels = np.random.default_rng(2).integers(0, 9, (8, 32, 32, 3), dtype=np.uint8)
    batch = Images(pixels, np.ones((8, 32, 32), bool))
    inference = Inference(Counting(), {}, replace(CONFIG, eval=replace(CONFIG.eval, query_slots=(2,))), decode)
    assert set((pixels[:, 0, 0, 2].reshape(-1, 2) > 5).any(axis=1)) == {True, False}  # parts of two and of three slots
    encode, calls = inference._encode, []
    monkeypatch.setattr(inference, "_encode", lambda *given: calls.append(len(given[1].pixels)) or encode(*given))
    for wanted, expected in ((8, [2, 2, 2, 2]), (5, [2, 2, 2]), (2, [2])):
        calls.clear()
        found = inference(batch, [(10, 10)] * wanted, EVERYTHING)
        assert calls == expected
        assert len(found) == wanted
        for place, one in enumerate(found):
            [alone] = inference(jax.tree.map(lambda x, i=place: x[i : i + 1], batch), [(10, 10)], EVERYTHING)
            np.testing.assert_array_equal(one.boxes, alone.boxes)
            np.testing.assert_array_equal(one.scores, alone.scores)
    assert rows == [2, 1]  # a program of two images, and one of one
    odd = jax.tree.map(lambda x: x[:5], batch)
    calls.clear()
    inference(odd, [(10, 10)] * 5, EVERYTHING)
    assert calls == [1] * 5
    monkeypatch.setattr("opendet_jax.inference.CACHED", 8 * 32 * 32)
    calls.clear()
    inference(batch, [(10, 10)] * 5, EVERYTHING)
    assert calls == [8]


def test_fits_the_model():
    """Traced, not run: what OpenDet gives is what is asked of it."""
    config = parse_config(get_config())
    model = OpenDet(config.model, config.ablation)
    params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    inference = Inference(model, {}, config, decode)
    photographs = Images(np.zeros((2, 128, 128, 3), np.uint8), np.ones((2, 128, 128), bool))

    def both_halves(params, images):
        return inference._candidates((params, ((0.9, 300), None)), inference._first_half(params, images))

    found = jax.eval_shape(both_halves, params, photographs)
    queries, width, limits = config.model.max_queries, config.model.text_width, config.eval
    assert (found.corners.shape, found.scores.shape) == ((2, queries, 4), (2, queries))
    assert (found.kept.dtype, found.prompts.shape) == (bool, (2, queries, width))
    tokens, scores = jax.eval_shape(
        partial(inference._names, trie=None, most_tokens=limits.max_new_tokens),
        params,
        np.zeros((4, width), np.float32),
    )
    assert tokens.shape == (4, limits.num_beams, 1 + limits.max_new_tokens)
    assert scores.shape == (4, limits.num_beams)
