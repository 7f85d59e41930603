"""The detector against the authors' program: selection, denoising, decoder, aligner, distiller, whole forward passes.

A stage gets the stored inputs (tolerance 1e-5); the whole model gets images (5e-5; boxes 5e-6). Q is 900 or S here and
the program's is smaller: what is compared are the valid slots, and the empty ones must not disturb them.
"""

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
from opendet_jax.model.query_selection import BinaryHead, QuerySelection, fill_as_program
from tests.parity import report
from tests.parity.vectors import BOXES, MODEL, STAGE, Vectors, params_of

T5 = T5Config(vocab_size=512, num_layers=2, ffn_width=256, activation="gelu_erf", head_bias=True)
CONFIG = ModelConfig(query_fill="program", t5=T5)
LAYERS = range(1, 7)
DETECTOR = (
    *("backbone", "neck", "encoder", "query_selection", "denoising", "decoder"),
    *("aligner_one_to_many", "aligner_one_to_one", "aligner_encoder", "distiller"),
)
LEVELS = tuple(f"neck/level_{level}" for level in range(4))
MEMORY = ("encoder/layer_6", *LEVELS, "input/valid_ratios", "input/level_shapes")


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


def assert_same_boxes(vectors: Vectors, boxes, logits: np.ndarray) -> None:
    """Stored as logits: 1e-5 there is 1e-5 relative in a small box; near 1 float32 boxes cannot show more."""
    want = 1 / (1 + np.exp(-logits.astype(np.float64)))
    relative = float(np.abs(np.asarray(boxes) / want - 1).max(initial=0.0))
    absolute = float(np.abs(np.asarray(boxes) - want).max(initial=0.0))
    report.enter_error("denoising inputs", vectors.name, absolute, relative, STAGE, is_relative=True)
    np.testing.assert_allclose(boxes, want, rtol=STAGE, atol=0)


def assert_attention(vectors: Vectors, sees, want: np.ndarray, keep: np.ndarray) -> None:
    for image in np.asarray(sees):
        got = ~image[np.ix_(keep, keep)]
        report.enter("denoising attention mask", vectors.name, want, got, 0.0)
        np.testing.assert_array_equal(got, want)


@pytest.mark.needs("denoising/")
def test_denoising_queries(unit_vectors):
    units = unit_vectors
    for case in units.cases("denoising/"):
        key = f"denoising/{case}"
        counts, boxes = units[f"{key}/count"], units[f"{key}/object_boxes"]
        objects = padded_objects(boxes, counts)
        slots = denoising_slots(CONFIG, objects.valid.shape[1])
        randoms = noise(units, key, counts, slots)
        embedding = jnp.broadcast_to(jnp.arange(1.0, 93.0)[:, None], (92, CONFIG.width))  # row r holds r + 1
        made = Denoising(CONFIG).apply({"params": {"label_embedding": {"embedding": embedding}}}, objects, randoms)

        used = int(units[f"{key}/queries"])
        assert made.groups == units[f"{key}/groups"], case
        np.testing.assert_array_equal(made.valid, np.broadcast_to(np.arange(slots) < used, made.valid.shape))
        labels = units[f"{key}/labels"]
        units.assert_equal("denoising inputs", f"{key}/labels", np.asarray(made.content)[:, :used, 0] - 1)
        np.testing.assert_array_equal(made.content[:, used:], 0)
        assert_same_boxes(units, made.boxes[:, :used], units[f"{key}/boxes_unsigmoid"])

        most = int(units[f"{key}/single"])
        place = np.arange(used) % (2 * most)
        np.testing.assert_array_equal(made.positive[:, :used], (place < most) & (labels >= 0))
        np.testing.assert_array_equal(made.object[:, :used], np.where(labels >= 0, place % most, 0))
        sees = attention_mask(made, jnp.ones((len(counts), 10), bool))
        keep = np.r_[:used, slots : slots + 10]
        assert_attention(units, sees, units[f"{key}/attention_mask_with_10_queries"], keep)


# Stages on stored inputs


@pytest.mark.needs(*MEMORY, "select/index")
def test_query_selection_on_stored_memory(eval_vectors):
    vectors, params = eval_vectors, params_of(eval_vectors, "query_selection")
    _, memory = pyramids(vectors)
    queries, state = QuerySelection(CONFIG).apply(
        {"params": params["query_selection"]},
        memory,
        capture_intermediates=lambda module, _: isinstance(module, BinaryHead),
    )
    size = vectors["select/index"].shape[1]
    vectors.assert_close("token scores", "select/logits", state["intermediates"]["score"]["__call__"][0], STAGE)
    vectors.assert_equal("selected tokens", "select/index", queries.index[:, :size])
    np.testing.assert_array_equal(queries.valid.sum(axis=1), size)
    vectors.assert_close("selected features", "select/features", queries.content[:, :size], STAGE)
    vectors.assert_close("initial boxes", "select/boxes", queries.boxes[:, :size], BOXES)


def assert_selection_on_stored_scores(vectors: Vectors) -> None:
    logits, size = vectors["select/logits"], vectors["select/index"].shape[1]
    chosen, valid = fill_as_program(jnp.asarray(logits), min(900, logits.shape[1]), 0.05, 300)
    vectors.assert_equal("selected tokens", "select/index", chosen[:, :size])
    np.testing.assert_array_equal(valid.sum(axis=1), size)


@pytest.mark.needs("select/logits", "select/index")
def test_selection_on_stored_scores_at_inference(eval_vectors):
    assert_selection_on_stored_scores(eval_vectors)


@pytest.mark.needs("select/logits", "select/index")
def test_selection_on_stored_scores_in_training(train_vectors):
    assert_selection_on_stored_scores(train_vectors)


@pytest.mark.needs(*MEMORY, "select/features", "select/boxes")
def test_decoder_on_stored_queries(eval_vectors):
    vectors, params = eval_vectors, params_of(eval_vectors, "decoder")
    _, memory = pyramids(vectors)
    content, boxes = stored(vectors, "select/features", "select/boxes")
    sees = jnp.ones((len(content), content.shape[1], content.shape[1]), bool)
    decoded = jax.jit(Decoder(CONFIG).apply)({"params": params["decoder"]}, content, boxes, memory, sees)
    assert_decoded(vectors, decoded, STAGE, slice(None))


def assert_decoded(vectors: Vectors, decoded, atol: float, keep) -> None:
    for layer in LAYERS:
        own = [x[layer - 1][:, keep] for x in (decoded.hidden, decoded.boxes, decoded.objectness)]
        vectors.assert_close("decoder states", f"decoder/h_{layer}", own[0], atol)
        vectors.assert_close("decoder boxes", f"decoder/boxes_{layer}", own[1], BOXES)
        vectors.assert_close("objectness", f"decoder/objectness_{layer}", own[2], atol)


HIDDEN = tuple(f"decoder/{what}_{layer}" for what in ("h", "boxes") for layer in LAYERS)


@pytest.mark.needs(*MEMORY, "align/texts", "select/features", *HIDDEN)
def test_aligners_on_stored_queries(eval_vectors):
    vectors, params = eval_vectors, params_of(eval_vectors, *DETECTOR)
    _, memory = pyramids(vectors)
    texts, content = stored(vectors, "align/texts", "select/features")
    align = jax.jit(Aligner(CONFIG).apply)
    first, last, encoder = ({"params": params[f"aligner_{name}"]} for name in ("one_to_many", "one_to_one", "encoder"))
    vectors.assert_close("alignment, encoder", "align/encoder", align(encoder, content, texts), STAGE)
    for layer in LAYERS:
        hidden, boxes = stored(vectors, f"decoder/h_{layer}", f"decoder/boxes_{layer}")
        aligner = first if layer <= 4 else last
        vectors.assert_close("alignment, plain", f"align/plain_{layer}", align(aligner, hidden, texts), STAGE)
        if layer > 4:
            refined = align(aligner, hidden, texts, memory, boxes)
            vectors.assert_close("alignment, refined", f"align/refined_{layer}", refined, STAGE)


def inside_distiller(module, _) -> bool:
    return isinstance(module, DistillerBlock | Projection)


def assert_distiller(vectors: Vectors, distiller: dict, atol: float, size: int) -> None:
    """`distiller`: captured outputs of its parts."""
    for stage, key, part in (
        ("distiller branches", "h_back", "backbone_blocks_1"),
        ("distiller branches", "h_enc", "encoder_blocks_1"),
        ("projections φ", "phi", "phi"),
        ("projections φ", "phi_b", "phi_backbone"),
        ("projections φ", "phi_e", "phi_encoder"),
    ):
        vectors.assert_close(stage, f"distill/{key}", distiller[part]["__call__"][0][:, :size], atol)


@pytest.mark.needs(*MEMORY, "decoder/h_6", "decoder/boxes_6")
def test_distiller_on_stored_queries(eval_vectors):
    vectors, params = eval_vectors, params_of(eval_vectors, "distiller")
    features, memory = pyramids(vectors)
    hidden, boxes = stored(vectors, "decoder/h_6", "decoder/boxes_6")
    variables = {"params": params["distiller"]}
    prompts, state = Distiller(CONFIG).apply(
        variables, hidden, boxes, features, memory, capture_intermediates=inside_distiller
    )
    assert_distiller(vectors, state["intermediates"], STAGE, hidden.shape[1])
    vectors.assert_close("prompts", "distill/prompts", prompts.distilled, STAGE)
    vectors.assert_close("prompts", "distill/prompts", prompts.language, STAGE)


# The whole model


def captured(module, name) -> bool:
    return isinstance(module, Encoder | BinaryHead) or inside_distiller(module, name)


@pytest.mark.needs("select/index", "input/mask")
def test_whole_model_at_inference(eval_vectors):
    vectors, params = eval_vectors, params_of(eval_vectors, *DETECTOR)
    model = OpenDet(CONFIG)

    def detect(params, images, texts):
        detected, state = model.apply({"params": params}, images, method=OpenDet.detect, capture_intermediates=captured)
        memory = state["intermediates"]["encoder"]["__call__"][0]
        alignment = model.apply({"params": params}, detected.decoded, texts, memory, True, method=OpenDet.align)
        plain = Aligner(CONFIG).apply({"params": params["aligner_encoder"]}, detected.queries.content, texts)
        return detected, alignment, plain, state["intermediates"]

    no_texts = np.ones((len(vectors["input/mask"]), 1, 768), np.float32)
    texts = vectors.arrays.get("align/texts", no_texts)
    detected, alignment, encoder_alignment, inside = jax.jit(detect)(params, images_of(vectors), jnp.asarray(texts))
    size = vectors["select/index"].shape[1]
    queries = detected.queries
    vectors.assert_close("encoder layers", "encoder/layer_6", inside["encoder"]["__call__"][0].tokens, MODEL)
    vectors.assert_close("token scores", "select/logits", inside["query_selection"]["score"]["__call__"][0], MODEL)
    np.testing.assert_array_equal(queries.valid.sum(axis=1), size)
    vectors.assert_equal("selected tokens", "select/index", queries.index[:, :size])
    vectors.assert_close("selected features", "select/features", queries.content[:, :size], MODEL)
    vectors.assert_close("initial boxes", "select/boxes", queries.boxes[:, :size], BOXES)
    assert_decoded(vectors, detected.decoded, MODEL, slice(size))
    for layer in LAYERS:
        form = "plain" if layer <= 4 else "refined"
        vectors.assert_close(f"alignment, {form}", f"align/{form}_{layer}", alignment[layer - 1, :, :size], MODEL)
    vectors.assert_close("alignment, encoder", "align/encoder", encoder_alignment[:, :size], MODEL)
    assert_distiller(vectors, inside["distiller"], MODEL, size)
    vectors.assert_close("prompts", "distill/prompts", detected.prompts[:, :size], MODEL)


@pytest.mark.needs("select/index", "objects/boxes", "objects/texts", "dn/queries", "dn/single", "dn/groups")
def test_whole_model_in_training(train_vectors):
    vectors, params = train_vectors, params_of(train_vectors, *DETECTOR)
    counts = vectors["objects/count"]
    objects = padded_objects(vectors["objects/boxes"], counts, vectors["objects/texts"])
    slots = denoising_slots(CONFIG, objects.valid.shape[1])
    randoms = noise(vectors, "dn/random", counts, slots)

    def forward(params, images, objects, randoms):
        model, options = OpenDet(CONFIG), {"deterministic": True, "capture_intermediates": captured}
        out, state = model.apply({"params": params}, images, objects, randoms, **options)
        last = [jnp.concatenate(list(x[-2:]), axis=1) for x in (out.decoded.hidden, out.decoded.boxes)]
        _, distilled = model.apply({"params": params}, *last, out.features, out.memory, method="distil", **options)
        return out, state["intermediates"] | distilled["intermediates"]

    out, inside = jax.jit(forward)(params, images_of(vectors), objects, randoms)
    used, size, most = int(vectors["dn/queries"]), vectors["select/index"].shape[1], int(vectors["dn/single"])
    keep = np.r_[:used, slots : slots + size]

    assert out.denoising.groups == vectors["dn/groups"]
    vectors.assert_close("denoising inputs", "dn/content", out.denoising.content[:, :used], STAGE)
    assert_same_boxes(vectors, out.denoising.boxes[:, :used], vectors["dn/boxes_unsigmoid"])
    sees = attention_mask(out.denoising, out.queries.valid)
    assert_attention(vectors, sees, vectors["dn/attention_mask"], keep)

    vectors.assert_close("encoder layers", "encoder/memory", inside["encoder"]["__call__"][0].tokens, MODEL)
    vectors.assert_close("token scores", "select/logits", inside["query_selection"]["score"]["__call__"][0], MODEL)
    vectors.assert_equal("selected tokens", "select/index", out.queries.index[:, :size])
    vectors.assert_close("initial boxes", "select/boxes", out.queries.boxes[:, :size], BOXES)
    vectors.assert_close("alignment, encoder", "align/encoder", out.encoder_alignment[:, :size, :most], MODEL)
    assert_decoded(vectors, out.decoded, MODEL, keep)
    for number, layer in enumerate((5, 6)):
        rows = number * (slots + out.queries.valid.shape[1]) + keep
        for key, part in {"h_back": "backbone_blocks_1", "h_enc": "encoder_blocks_1"}.items():
            got = inside["distiller"][part]["__call__"][0][:, rows]
            vectors.assert_close("distiller branches", f"distill/{key}_{layer}", got, MODEL)
    for layer in LAYERS:
        stage = "alignment, plain" if layer <= 4 else "alignment, refined"
        vectors.assert_close(stage, f"align/layer_{layer}", out.alignment[layer - 1][:, keep, :most], MODEL)
