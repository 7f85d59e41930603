"""The detector against the authors' program: selection, denoising, decoder, aligner, distiller, whole forward passes.

A stage gets the stored inputs (tolerance 1e-5); the whole model gets images (5e-5; boxes 5e-6). Q is 900 or S here and
the program's is 300 or 388: what is compared are the valid slots, and the empty ones must not disturb them.
"""

from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opendet_jax.batch import Images, Objects
from opendet_jax.config import ModelConfig, T5Config
from opendet_jax.model.aligner import Aligner
from opendet_jax.model.decoder import Decoder
from opendet_jax.model.denoising import Denoising, DenoisingRandoms, attention_mask, denoising_slots
from opendet_jax.model.distiller import Distiller, DistillerBlock, Projection
from opendet_jax.model.encoder import Encoder, Memory
from opendet_jax.model.neck import Features
from opendet_jax.model.opendet import OpenDet
from opendet_jax.model.query_selection import BinaryHead, QuerySelection, fill_as_program, proposals, select_best
from opendet_jax.weights.detector import DETECTOR_RULES
from opendet_jax.weights.rules import convert
from opendet_jax.weights.swin import SWIN_RULES
from tests.parity.vectors import Vectors, state_dict

STAGE, MODEL, BOXES = 1e-5, 5e-5, 5e-6
T5 = T5Config(vocab_size=512, num_layers=2, ffn_width=256, activation="gelu_erf", head_bias=True)
CONFIG = ModelConfig(query_fill="program", t5=T5)
LAYERS = range(1, 7)
SELECTIONS = ("few", "many", "over", "none", "one_empty", "both_over", "edge", "single", "single_over")
NOISES = ("two_images", "one_image", "crowded", "lonely")


@cache
def load(folder: Path, name: str) -> tuple[Vectors, dict]:
    """A file, and the parameters behind it but for the name generator's, which has its own tests."""
    vectors = Vectors(folder / f"{name}.npz")
    state = state_dict(folder, vectors)
    state = {name: value for name, value in state.items() if ".class_generate." not in name}
    return vectors, convert(state, (*SWIN_RULES, *DETECTOR_RULES))


def images_of(vectors: Vectors) -> Images:
    """The photographs in our layout, with something visible where the mask says padding."""
    mask = ~vectors["input/mask"]
    pixels = np.full((*mask.shape, 3), 199, np.uint8)
    for number, (height, width) in enumerate(vectors["meta/sizes_hw"]):
        pixels[number, :height, :width] = vectors[f"input/pixels_{number}"].transpose(1, 2, 0)
    return Images(pixels=pixels, mask=mask)


def level_masks(vectors: Vectors) -> np.ndarray:
    """Valid tokens, [B, S], from the stored valid ratios (the photograph is in the corner)."""
    levels = []
    for level, (height, width) in enumerate(vectors["input/level_shapes"]):
        ratio = vectors["input/valid_ratios"][:, level]
        columns = np.arange(width) < np.rint(ratio[:, :1] * width)
        rows = np.arange(height) < np.rint(ratio[:, 1:] * height)
        levels.append((rows[:, :, None] & columns[:, None]).reshape(len(ratio), -1))
    return np.concatenate(levels, axis=1)


def pyramids(vectors: Vectors) -> tuple[Features, Memory]:
    """B_feat and E_feat as stored."""
    shapes = tuple((int(h), int(w)) for h, w in vectors["input/level_shapes"])
    valid, ratios = jnp.asarray(level_masks(vectors)), jnp.asarray(vectors["input/valid_ratios"])
    maps = [vectors[f"neck/level_{level}"].transpose(0, 2, 3, 1) for level in range(4)]
    tokens = jnp.concatenate([m.reshape(len(m), -1, m.shape[-1]) for m in maps], axis=1)
    features = Features(
        tokens=tokens, valid=valid, valid_ratios=ratios, level_shapes=shapes, positions=jnp.zeros_like(tokens)
    )
    return features, Memory(jnp.asarray(vectors["encoder/layer_6"]), valid, ratios, shapes)


def stored(vectors: Vectors, *keys: str) -> list[jax.Array]:
    return [jnp.asarray(vectors[key]) for key in keys]


# Single operations


@pytest.mark.parametrize("case", SELECTIONS)
def test_selection_as_the_program(vectors_folder, case):
    units = Vectors(vectors_folder / "units.npz")
    logits, want = units[f"select/{case}/logits"], units[f"select/{case}/index"]
    index, valid = jax.jit(fill_as_program, static_argnums=(1, 2, 3))(logits, 900, 0.05, 300)
    size = want.shape[1]
    np.testing.assert_array_equal(index[:, :size], want)
    np.testing.assert_array_equal(valid, np.broadcast_to(np.arange(900) < size, valid.shape))


@pytest.mark.parametrize("case", SELECTIONS)
def test_selection_of_the_paper_is_the_programs_without_the_filling(vectors_folder, case):
    units = Vectors(vectors_folder / "units.npz")
    logits, stored_index = units[f"select/{case}/logits"], units[f"select/{case}/index"]
    index, valid = select_best(jnp.asarray(logits), jnp.ones(logits.shape, bool), 900, 0.05, 300)
    count = (1 / (1 + np.exp(-logits.astype(np.float64))) >= 0.05).sum(axis=1)
    for image, qualified in enumerate(count):
        order = np.argsort(-logits[image], kind="stable")
        want = order[: min(qualified, 900) if qualified else 300]
        np.testing.assert_array_equal(index[image][valid[image]], want)
        if qualified or not count.any():
            assert set(want) == set(stored_index[image][: len(want)])


def test_proposals(vectors_folder):
    units = Vectors(vectors_folder / "units.npz")
    mask = jnp.asarray(~units["proposals/mask"])
    shapes = tuple((int(h), int(w)) for h, w in units["proposals/level_shapes"])
    ratios = jnp.ones((len(mask), 4, 2))  # proposals count cells
    boxes, valid = proposals(Memory(jnp.zeros((*mask.shape, 8)), mask, ratios, shapes))
    np.testing.assert_array_equal(valid, units["proposals/valid"])
    units.assert_close("proposals/boxes", np.where(valid[..., None], boxes, 1.0), 1e-6)


def noise(arrays, prefix: str, counts: np.ndarray, slots: int) -> DenoisingRandoms:
    """The stored flat random numbers (half-group, then image, then object) in our slots."""
    most, total = int(counts.max()), int(counts.sum())
    shape = (len(counts), slots)
    u_flip, new_label = np.ones(shape, np.float32), np.zeros(shape, np.int32)
    sign, u_box = np.ones((*shape, 4), np.float32), np.full((*shape, 4), 0.5, np.float32)
    for i in range(len(arrays[f"{prefix}/u_flip"])):
        half, rest = divmod(i, total)
        image = int(np.searchsorted(np.cumsum(counts), rest, side="right"))
        slot = half * most + rest - int(counts[:image].sum())
        u_flip[image, slot] = arrays[f"{prefix}/u_flip"][i]
        new_label[image, slot] = arrays[f"{prefix}/new_label"][i]
        sign[image, slot] = arrays[f"{prefix}/sign"][i]
        u_box[image, slot] = arrays[f"{prefix}/u_box"][i]
    return DenoisingRandoms(*map(jnp.asarray, (u_flip, new_label, sign, u_box)))


def padded_objects(boxes: np.ndarray, counts: np.ndarray, texts: np.ndarray | None = None, extra: int = 3) -> Objects:
    """Stored objects with `extra` more slots, and nonsense in every slot without an object."""
    batch, most = boxes.shape[:2]
    valid = np.arange(most + extra) < counts[:, None]
    padded = np.full((batch, most + extra, 4), 0.3, np.float32)
    padded[:, :most] = boxes
    padded = np.where(valid[..., None], padded, np.float32(0.3))
    embeddings = np.zeros((batch, most + extra, 768), np.float32)
    if texts is not None:
        embeddings[:, :most] = texts
    return Objects(boxes=padded, valid=valid, texts=embeddings, tokens=np.ones((*valid.shape, 1), np.int32))


def assert_same_boxes(boxes, logits: np.ndarray) -> None:
    """Stored as logits: 1e-5 there is 1e-5 relative in a small box; near 1 float32 boxes cannot show more."""
    np.testing.assert_allclose(boxes, 1 / (1 + np.exp(-logits.astype(np.float64))), rtol=STAGE, atol=0)


@pytest.mark.parametrize("case", NOISES)
def test_denoising_queries(vectors_folder, case):
    units = Vectors(vectors_folder / "units.npz")
    counts, boxes = units[f"denoising/{case}/count"], units[f"denoising/{case}/object_boxes"]
    objects = padded_objects(boxes, counts)
    slots = denoising_slots(CONFIG, objects.valid.shape[1])
    randoms = noise(units, f"denoising/{case}", counts, slots)
    embedding = jnp.broadcast_to(jnp.arange(1.0, 93.0)[:, None], (92, CONFIG.width))  # row r holds r + 1
    made = Denoising(CONFIG).apply({"params": {"label_embedding": {"embedding": embedding}}}, objects, randoms)

    used = int(units[f"denoising/{case}/queries"])
    assert made.groups == units[f"denoising/{case}/groups"]
    np.testing.assert_array_equal(made.valid, np.broadcast_to(np.arange(slots) < used, made.valid.shape))
    labels = units[f"denoising/{case}/labels"]
    np.testing.assert_array_equal(made.content[:, :used, 0] - 1, labels)
    np.testing.assert_array_equal(made.content[:, used:], 0)
    assert_same_boxes(made.boxes[:, :used], units[f"denoising/{case}/boxes_unsigmoid"])

    most = int(units[f"denoising/{case}/single"])
    place = np.arange(used) % (2 * most)
    np.testing.assert_array_equal(made.positive[:, :used], (place < most) & (labels >= 0))
    np.testing.assert_array_equal(made.object[:, :used], np.where(labels >= 0, place % most, 0))
    sees = attention_mask(made, jnp.ones((len(counts), 10), bool))
    keep = np.r_[:used, slots : slots + 10]
    for image in np.asarray(sees):
        want = units[f"denoising/{case}/attention_mask_with_10_queries"]
        np.testing.assert_array_equal(~image[np.ix_(keep, keep)], want)


# Stages on stored inputs


def test_query_selection_on_stored_memory(vectors_folder):
    vectors, params = load(vectors_folder, "eval_a")
    _, memory = pyramids(vectors)
    queries, state = QuerySelection(CONFIG).apply(
        {"params": params["query_selection"]},
        memory,
        capture_intermediates=lambda module, _: isinstance(module, BinaryHead),
    )
    vectors.assert_close("select/logits", state["intermediates"]["score"]["__call__"][0], STAGE)
    np.testing.assert_array_equal(queries.index[:, :300], vectors["select/index"])
    np.testing.assert_array_equal(queries.valid.sum(axis=1), 300)
    vectors.assert_close("select/features", queries.content[:, :300], STAGE)
    vectors.assert_close("select/boxes", queries.boxes[:, :300], BOXES)


@pytest.mark.parametrize("name", ["eval_b", "eval_pad", "train_a", "train_b"])
def test_selection_on_stored_scores(vectors_folder, name):
    vectors, _ = load(vectors_folder, name)
    logits, index = vectors["select/logits"], vectors["select/index"]
    slots = min(900, logits.shape[1])
    chosen, valid = fill_as_program(jnp.asarray(logits), slots, 0.05, 300)
    np.testing.assert_array_equal(chosen[:, : index.shape[1]], index)
    np.testing.assert_array_equal(valid.sum(axis=1), index.shape[1])


def test_decoder_on_stored_queries(vectors_folder):
    vectors, params = load(vectors_folder, "eval_a")
    _, memory = pyramids(vectors)
    content, boxes = stored(vectors, "select/features", "select/boxes")
    sees = jnp.ones((1, 300, 300), bool)
    decoded = jax.jit(Decoder(CONFIG).apply)({"params": params["decoder"]}, content, boxes, memory, sees)
    for layer in LAYERS:
        vectors.assert_close(f"decoder/h_{layer}", decoded.hidden[layer - 1], STAGE)
        vectors.assert_close(f"decoder/boxes_{layer}", decoded.boxes[layer - 1], BOXES)
        vectors.assert_close(f"decoder/objectness_{layer}", decoded.objectness[layer - 1], STAGE)


def test_aligners_on_stored_queries(vectors_folder):
    vectors, params = load(vectors_folder, "eval_a")
    _, memory = pyramids(vectors)
    texts, content = stored(vectors, "align/texts", "select/features")
    align = jax.jit(Aligner(CONFIG).apply)
    first, last, encoder = ({"params": params[f"aligner_{name}"]} for name in ("one_to_many", "one_to_one", "encoder"))
    vectors.assert_close("align/encoder", align(encoder, content, texts), STAGE)
    for layer in LAYERS:
        hidden, boxes = stored(vectors, f"decoder/h_{layer}", f"decoder/boxes_{layer}")
        aligner = first if layer <= 4 else last
        vectors.assert_close(f"align/plain_{layer}", align(aligner, hidden, texts), STAGE)
        if layer > 4:
            refined = align(aligner, hidden, texts, memory, boxes)
            vectors.assert_close(f"align/refined_{layer}", refined, STAGE)


def inside_distiller(module, _) -> bool:
    return isinstance(module, DistillerBlock | Projection)


def assert_distiller_close(vectors: Vectors, distiller: dict, atol: float, size: int) -> None:
    """`distiller`: captured outputs of its parts."""
    for key, part in {
        "h_back": "backbone_blocks_1",
        "h_enc": "encoder_blocks_1",
        "phi": "phi",
        "phi_b": "phi_backbone",
        "phi_e": "phi_encoder",
    }.items():
        vectors.assert_close(f"distill/{key}", distiller[part]["__call__"][0][:, :size], atol)


def test_distiller_on_stored_queries(vectors_folder):
    vectors, params = load(vectors_folder, "eval_a")
    features, memory = pyramids(vectors)
    hidden, boxes = stored(vectors, "decoder/h_6", "decoder/boxes_6")
    variables = {"params": params["distiller"]}
    prompts, state = Distiller(CONFIG).apply(
        variables, hidden, boxes, features, memory, capture_intermediates=inside_distiller
    )
    assert_distiller_close(vectors, state["intermediates"], STAGE, 300)
    vectors.assert_close("distill/prompts", prompts.distilled, STAGE)
    vectors.assert_close("distill/prompts", prompts.language, STAGE)


# The whole model


def captured(module, name) -> bool:
    return isinstance(module, Encoder | BinaryHead) or inside_distiller(module, name)


@pytest.mark.parametrize("name", ["eval_a", "eval_b", "eval_pad"])
def test_whole_model_at_inference(vectors_folder, name):
    vectors, params = load(vectors_folder, name)
    model = OpenDet(CONFIG)

    def detect(params, images, texts):
        detected, state = model.apply({"params": params}, images, method=OpenDet.detect, capture_intermediates=captured)
        memory = state["intermediates"]["encoder"]["__call__"][0]
        alignment = model.apply({"params": params}, detected.decoded, texts, memory, True, method=OpenDet.align)
        plain = Aligner(CONFIG).apply({"params": params["aligner_encoder"]}, detected.queries.content, texts)
        return detected, alignment, plain, state["intermediates"]

    detected, alignment, encoder_alignment, inside = jax.jit(detect)(
        params, images_of(vectors), *stored(vectors, "align/texts")
    )
    size = vectors["select/index"].shape[1]
    queries, decoded = detected.queries, detected.decoded
    vectors.assert_close("encoder/layer_6", inside["encoder"]["__call__"][0].tokens, MODEL)
    vectors.assert_close("select/logits", inside["query_selection"]["score"]["__call__"][0], MODEL)
    np.testing.assert_array_equal(queries.valid.sum(axis=1), size)
    np.testing.assert_array_equal(queries.index[:, :size], vectors["select/index"])
    vectors.assert_close("select/features", queries.content[:, :size], MODEL)
    vectors.assert_close("select/boxes", queries.boxes[:, :size], BOXES)
    for layer in LAYERS:
        vectors.assert_close(f"decoder/h_{layer}", decoded.hidden[layer - 1, :, :size], MODEL)
        vectors.assert_close(f"decoder/boxes_{layer}", decoded.boxes[layer - 1, :, :size], BOXES)
        vectors.assert_close(f"decoder/objectness_{layer}", decoded.objectness[layer - 1, :, :size], MODEL)
        form = "plain" if layer <= 4 else "refined"
        vectors.assert_close(f"align/{form}_{layer}", alignment[layer - 1, :, :size], MODEL)
    vectors.assert_close("align/encoder", encoder_alignment[:, :size], MODEL)
    assert_distiller_close(vectors, inside["distiller"], MODEL, size)
    vectors.assert_close("distill/prompts", detected.prompts[:, :size], MODEL)


@pytest.mark.parametrize("name", ["train_a", "train_b"])
def test_whole_model_in_training(vectors_folder, name):
    vectors, params = load(vectors_folder, name)
    counts = vectors["objects/count"]
    objects = padded_objects(vectors["objects/boxes"], counts, vectors["objects/texts"])
    slots = denoising_slots(CONFIG, objects.valid.shape[1])
    randoms = noise(vectors, "dn/random", counts, slots)

    def forward(params, images, objects, randoms):
        return OpenDet(CONFIG).apply(
            {"params": params}, images, objects, randoms, deterministic=True, capture_intermediates=captured
        )

    out, state = jax.jit(forward)(params, images_of(vectors), objects, randoms)
    inside = state["intermediates"]
    used, size, most = int(vectors["dn/queries"]), vectors["select/index"].shape[1], int(vectors["dn/single"])
    keep = np.r_[:used, slots : slots + size]

    assert out.denoising.groups == vectors["dn/groups"]
    vectors.assert_close("dn/content", out.denoising.content[:, :used], STAGE)
    assert_same_boxes(out.denoising.boxes[:, :used], vectors["dn/boxes_unsigmoid"])
    for sees in np.asarray(attention_mask(out.denoising, out.queries.valid)):
        np.testing.assert_array_equal(~sees[np.ix_(keep, keep)], vectors["dn/attention_mask"])

    vectors.assert_close("encoder/memory", inside["encoder"]["__call__"][0].tokens, MODEL)
    vectors.assert_close("select/logits", inside["query_selection"]["score"]["__call__"][0], MODEL)
    np.testing.assert_array_equal(out.queries.index[:, :size], vectors["select/index"])
    vectors.assert_close("select/boxes", out.queries.boxes[:, :size], BOXES)
    vectors.assert_close("align/encoder", out.encoder_alignment[:, :size, :most], MODEL)
    for layer in LAYERS:
        vectors.assert_close(f"decoder/h_{layer}", out.decoded.hidden[layer - 1][:, keep], MODEL)
        vectors.assert_close(f"decoder/boxes_{layer}", out.decoded.boxes[layer - 1][:, keep], BOXES)
        vectors.assert_close(f"decoder/objectness_{layer}", out.decoded.objectness[layer - 1][:, keep], MODEL)
    for number, layer in enumerate((5, 6)):
        rows = number * (slots + out.queries.valid.shape[1]) + keep
        for key, part in {"h_back": "backbone_blocks_1", "h_enc": "encoder_blocks_1"}.items():
            got = inside["distiller"][part]["__call__"][0][:, rows]
            vectors.assert_close(f"distill/{key}_{layer}", got, MODEL)
    for layer in LAYERS:
        vectors.assert_close(f"align/layer_{layer}", out.alignment[layer - 1][:, keep, :most], MODEL)
