"""One training step on one 480 × 640 photograph with 20 objects: forward, matching, losses, backward, AdamW.

    python -m benchmarks.training_step

The detector only, on both sides: Swin-T, six encoder layers, six decoder layers that all match one-to-one, 300 queries;
focal, L1 and GIoU losses for every layer and the encoder's proposals. The peer is transformers' two-stage
DeformableDetr with box refinement.

The full step (Swin-T, 900 queries at most, denoising, aligners, distiller, Flan-T5-base, all losses, the optimizer) has
no peer in transformers and is timed alone; `python -m benchmarks.parts` says where its time goes.
"""

from functools import partial
from typing import Any

import numpy as np

from benchmarks.comparison import Case, Ours, Run, main
from benchmarks.multiply_adds import products
from benchmarks.sizes import HEIGHT, WIDTH, detr_config

QUERIES, OBJECTS = 300, 20
RATE, DECAY, CLIP = 1e-4, 0.05, 0.1


def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (1, HEIGHT, WIDTH, 3), dtype=np.uint8)


def boxes(objects: int = OBJECTS) -> np.ndarray:
    rng = np.random.default_rng(1)
    centres, sizes = rng.uniform(0.3, 0.7, (objects, 2)), rng.uniform(0.1, 0.5, (objects, 2))
    return np.concatenate([centres, sizes], 1).astype(np.float32)


def ours() -> Ours:
    import time

    import jax
    import jax.numpy as jnp
    import optax

    from opendet_jax.batch import Images
    from opendet_jax.config import Ablation, ModelConfig, T5Config
    from opendet_jax.losses.detection import giou_loss, l1_loss, objectness_focal_loss
    from opendet_jax.losses.matching import ONE_TO_ONE, Predictions, Targets, match
    from opendet_jax.model.opendet import OpenDet, init_params

    t5 = T5Config(vocab_size=32, num_layers=1, num_heads=1, ffn_width=8)
    model = OpenDet(ModelConfig(min_queries=QUERIES, max_queries=QUERIES, t5=t5), Ablation(object_detector=False))
    params = init_params(model, jax.random.key(0))
    parts = ("backbone", "neck", "encoder", "query_selection", "decoder")
    params = {part: params[part] for part in parts}
    images = Images(pixels(), np.ones((1, HEIGHT, WIDTH), bool))
    targets = Targets(
        boxes=jnp.asarray(boxes())[None],
        valid=jnp.ones((1, OBJECTS), bool),
        texts=jnp.zeros((1, OBJECTS, 1)),
        tokens=jnp.zeros((1, OBJECTS, 1), jnp.int32),
    )

    def detect(model: OpenDet, images: Images):
        _, memory, queries = model.encode(images, deterministic=False)
        stop = jax.lax.stop_gradient
        sees = jnp.ones((1, QUERIES, QUERIES), bool)
        return queries, model.decoder(stop(queries.content), stop(queries.boxes), memory, sees)

    def loss(params, images):
        rngs = {"dropout": jax.random.key(0)}
        queries, decoded = model.apply({"params": params}, images, method=detect, rngs=rngs)
        every = Predictions(
            boxes=jnp.concatenate([decoded.boxes, queries.boxes[None]]),
            objectness=jnp.concatenate([decoded.objectness, queries.objectness[None]]),
            alignment=jnp.zeros((len(decoded.boxes) + 1, 1, QUERIES, OBJECTS)),
            valid=jnp.ones((len(decoded.boxes) + 1, 1, QUERIES), bool),
        )
        matched = match(every, targets, ONE_TO_ONE).object

        def one_set(p: Predictions, matched_object):
            chosen = matched_object >= 0
            own = jnp.take_along_axis(targets.boxes, jnp.maximum(matched_object, 0)[..., None], axis=1)
            return (
                objectness_focal_loss(p.objectness, chosen, p.valid, OBJECTS)
                + 5 * l1_loss(p.boxes, own, chosen, OBJECTS)
                + 2 * giou_loss(p.boxes, own, chosen, OBJECTS)
            )

        return jax.vmap(one_set)(every, matched).sum()

    optimizer = optax.chain(optax.clip_by_global_norm(CLIP), optax.adamw(RATE, weight_decay=DECAY))

    def step(params, state, images):
        value, gradients = jax.value_and_grad(loss)(params, images)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    work = products(step, params, optimizer.init(params), images)
    start = time.perf_counter()
    program = jax.jit(step, donate_argnums=(0, 1)).lower(params, optimizer.init(params), images).compile()
    spent = time.perf_counter() - start
    state = [params, optimizer.init(params)]

    def run():
        state[0], state[1], value = program(state[0], state[1], images)
        assert np.isfinite(float(value))

    return Ours(run, spent, work)


def peer() -> Run:
    import torch
    from transformers import DeformableDetrForObjectDetection

    torch.manual_seed(0)
    model = DeformableDetrForObjectDetection(detr_config(QUERIES, True)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY)
    x = torch.from_numpy(pixels().transpose(0, 3, 1, 2).astype(np.float32) / 255)
    labels = [{"class_labels": torch.zeros(OBJECTS, dtype=torch.long), "boxes": torch.from_numpy(boxes())}]

    def run():
        optimizer.zero_grad()
        loss = model(x, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        assert torch.isfinite(loss)

    return run


def full_step(objects: int, tokens: int) -> tuple[Run, Any, float]:
    """(a step, its compiled program, seconds of compilation) of the full method, with names of so many tokens."""
    import time

    import jax

    from configs.swin_t import get_config
    from opendet_jax.batch import Batch, Images, Objects
    from opendet_jax.config_files import parse_config
    from opendet_jax.model.opendet import OpenDet, init_params
    from opendet_jax.parallel.mesh import make_mesh, place_batch
    from opendet_jax.train.optimizer import fresh_state, make_optimizer
    from opendet_jax.train.step import jit_step, make_train_step

    config = parse_config(get_config())
    slots, width = config.data.max_objects, config.model.text_width
    rng = np.random.default_rng(2)
    texts = rng.standard_normal((1, slots, width), np.float32)
    names = np.zeros((1, slots, config.data.max_name_tokens), np.int32)
    names[:, :objects, :tokens] = rng.integers(2, config.model.t5.vocab_size, (objects, tokens))
    names[:, :objects, tokens - 1] = 1
    named = Objects(
        boxes=np.pad(boxes(objects), ((0, slots - objects), (0, 0)))[None],
        valid=(np.arange(slots) < objects)[None],
        texts=texts / np.linalg.norm(texts, axis=-1, keepdims=True),
        tokens=names,
    )
    mesh = make_mesh(config.mesh)
    batch = place_batch(Batch(Images(pixels(), np.ones((1, HEIGHT, WIDTH), bool)), named), mesh)
    model, optimizer = OpenDet(config.model, config.ablation), make_optimizer(config.optimizer, config.ablation)
    state = [fresh_state(init_params(model, jax.random.key(0)), optimizer, config)]
    start = time.perf_counter()
    with jax.set_mesh(mesh):
        program = jit_step(make_train_step(model, optimizer, config), state[0], mesh).lower(state[0], batch).compile()
    spent = time.perf_counter() - start

    def run():
        state[0], terms = program(state[0], batch)
        assert np.isfinite(float(terms["total"]))

    return run, program, spent


def whole(objects: int, tokens: int) -> Ours:
    run, _, spent = full_step(objects, tokens)
    return Ours(run, spent)


CASES = (
    Case("training step 480×640, detector only", ours, peer, least=1.2),
    Case("training step 480×640, the full method, 10 names of 5 tokens", partial(whole, 10, 5), None),
    Case("training step 480×640, the full method, 40 names of 5 tokens", partial(whole, 40, 5), None),
    Case("training step 480×640, the full method, 10 names of 12 tokens", partial(whole, 10, 12), None),
)

if __name__ == "__main__":
    main(__doc__, "benchmarks.training_step", CASES)
