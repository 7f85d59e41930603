"""The small T5 that every arm starts from, pre-trained on names by span denoising.

    python -m experiments.ablations.pretrain

The corpus is made of words that are listed here, so that nobody needs outside data: 24 colours, 7 adjectives and 79
nouns, 15,788 names. The scenes' words are among them, 8 of the colours, one adjective and 6 of the nouns; the 12 names
that the scenes keep for evaluation are in no example. What T5 can know of those is what it knows of any name: how words
are spelled, and that colours stand before adjectives and these before nouns.

An example is a name in which one span is replaced by a mark. After one mark T5 writes the span (as T5 was pre-trained),
after the other the whole name (as instruction tuning taught Flan-T5 to answer in plain text). The input has no </s>, as
the prompts of a detector have none, and may be the mark alone.
"""

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int
from matplotlib.figure import Figure
from numpy import ndarray
from safetensors.numpy import load_file, save_file

from configs import scenes_tiny
from opendet_jax.config import Config
from opendet_jax.config_files import parse_config
from opendet_jax.data.scene_drawing import COLOURS, KINDS, SHAPES, UNSEEN
from opendet_jax.data.tokenizer import END, PADDING, ByteTokenizer
from opendet_jax.errors import InputError
from opendet_jax.files import replacing, write_json
from opendet_jax.model.name_generator import normalise_prompts
from opendet_jax.model.t5 import T5
from opendet_jax.weights.rules import flat, nested

HERE = Path(__file__).parent
WEIGHTS, FIGURES, PICTURE = HERE / "t5.safetensors", HERE / "t5.json", HERE / "t5.png"

MORE_COLOURS = (
    *("pink", "brown", "grey", "black", "gold", "silver", "beige", "teal"),
    *("maroon", "navy", "olive", "violet", "crimson", "ivory", "lime", "tan"),
)
ADJECTIVES = ("striped", "dotted", "checked", "spotted", "woven", "painted", "glossy")
MORE_NOUNS = (
    *("ball", "bottle", "book", "basket", "bench", "bird", "boat", "bowl", "box", "brush", "bucket", "button", "cake"),
    *("candle", "car", "cat", "chair", "clock", "coat", "coin", "cup", "curtain", "dog", "door", "drum", "fence"),
    *("flag", "flower", "fork", "glove", "hat", "horse", "house", "jar", "kettle", "key", "kite", "lamp", "leaf"),
    *("mirror", "mug", "pillow", "plate", "pot", "ribbon", "rope", "scarf", "shelf", "shirt", "shoe", "sign", "sofa"),
    *("spoon", "table", "tent", "towel", "train", "tree", "umbrella", "vase", "wagon", "wheel", "window", "hexagon"),
    *("oval", "arrow", "heart", "diamond", "crescent", "spiral", "cone", "cube", "anchor"),
)
NEVER_SEEN = tuple(kind.name for kind in KINDS if kind in UNSEEN)

SPAN, NAME = 259, 260  # of ByT5's tokens that no byte has: write the span, write the name
LENGTHS = (1, 2, 4, 8, 12, 16)  # tokens of an input, the mark included
STEPS, BATCH, RATE, WARMUP = 2500, 64, 3e-3, 100
LONGEST = 26  # tokens of a target
PROMPT_STEPS, PROMPT_RATE = 400, 0.02  # of `told_by_prompts`
SEED = 0
HELD_OUT = 0.05  # share of the corpus that is measured on
EVERY = 100  # steps


def corpus() -> list[str]:
    """Every name that can be made of the words, but those that the scenes never show in training."""
    colours, nouns = (*COLOURS, *MORE_COLOURS), (*SHAPES, *MORE_NOUNS)
    described = [*nouns, *(f"{adjective} {noun}" for adjective in ADJECTIVES for noun in nouns)]
    names = [*described, *(f"{colour} {rest}" for colour in colours for rest in described)]
    return [name for name in names if name not in NEVER_SEEN]


class Examples(NamedTuple):
    inputs: Int[ndarray, "R L"]
    targets: Int[ndarray, "R T"]  # ending in </s>, then padding


def examples(names: Sequence[str], length: int, rng: np.random.Generator) -> Examples:
    """One of each name, every second one with each mark; inputs have `length` tokens, no more than the name has."""
    tokenizer = ByteTokenizer()
    inputs, targets = np.zeros((len(names), length), np.int32), []
    for row, name in enumerate(names):
        tokens = tokenizer.encode(name)
        before = int(rng.integers(0, length))
        after = len(tokens) - (length - 1 - before)
        mark = (SPAN, NAME)[row % 2]
        inputs[row] = [*tokens[:before], mark, *tokens[after:]]
        targets.append([SPAN, *tokens[before:after], END] if mark == SPAN else [*tokens, END])
    padded = [[*target, *[PADDING] * (LONGEST - len(target))] for target in targets]
    return Examples(inputs, np.array(padded, np.int32))


def token_losses(
    t5: T5, inputs: Int[ndarray, "R L"], targets: Int[ndarray, "R T"]
) -> tuple[Float[Array, "R T"], Bool[Array, "R T"]]:
    """−log p of each target token given those before it, and whether it is the likeliest; 0 on padding."""
    return _written(t5, t5.shared(inputs), targets)


def _written(t5: T5, embeddings: Float[Array, "R P E"], targets: Int[Array | ndarray, "R T"]) -> Any:
    memory = t5.encode(embeddings)
    shifted = jnp.pad(targets[:, :-1], ((0, 0), (1, 0)))
    logits = t5.head(t5.decode(shifted, memory, targets != PADDING))
    real = targets != PADDING
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return jnp.where(real, losses, 0.0), real & (logits.argmax(-1) == targets)


def pretrain(config: Config) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """The parameters, and the loss of a token every so many steps."""
    t5 = T5(config.model.t5, config.model.text_width, lora=False, dtype=jnp.dtype(jnp.float32))
    names, rng = _split(corpus())[0], np.random.default_rng(SEED)
    long_enough = {length: [name for name in names if len(name) >= length] for length in LENGTHS}
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(optax.warmup_cosine_decay_schedule(0.0, RATE, WARMUP, STEPS), weight_decay=0.01),
    )

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, inputs, targets):
        def loss(params):
            losses, _ = t5.apply({"params": params}, inputs, targets, method=token_losses)
            return losses.sum() / (targets != PADDING).sum()

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    params = random_t5(config)
    state, curve, values = optimizer.init(params), [], []
    for number in range(1, STEPS + 1):
        length = LENGTHS[int(rng.integers(len(LENGTHS)))]
        chosen = rng.choice(len(long_enough[length]), BATCH)
        batch = examples([long_enough[length][place] for place in chosen], length, rng)
        params, state, value = step(params, state, *batch)
        values.append(value)
        if number % EVERY == 0:
            curve.append({"step": number, "loss": float(np.mean(jax.device_get(values)))})
            values = []
            print(f"step {number}: loss of a token {curve[-1]['loss']:.3f}", flush=True)
    return jax.device_get(params), curve


def measure(config: Config, params: dict[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """Of names that T5 was trained on, names held out, and those of the scenes: loss of a token, tokens right."""
    t5 = T5(config.model.t5, config.model.text_width, lora=False, dtype=jnp.dtype(jnp.float32))
    losses = jax.jit(partial(t5.apply, method=token_losses))
    trained, held_out = _split(corpus())
    seen = [kind.name for kind in KINDS if kind not in UNSEEN]
    sets = {"trained": trained[:: len(trained) // 512], "held_out": held_out, "scenes_seen": seen}
    found: dict[str, dict[str, dict[str, float]]] = {}
    for title, names in (*sets.items(), ("scenes_never_seen", list(NEVER_SEEN))):
        found[title] = {}
        for length in LENGTHS:
            rng = np.random.default_rng(SEED + 1)
            enough = [name for name in names if len(name) >= length] * 8
            batch = examples(enough, length, rng)
            loss, right = jax.device_get(losses({"params": params}, *batch))
            tokens = int((batch.targets != PADDING).sum())
            found[title][str(length)] = {
                "loss": round(float(loss.sum()) / tokens, 4),
                "right": round(float(right.sum()) / tokens, 4),
            }
    return found


def told_by_prompts(config: Config, params: dict[str, Any]) -> dict[str, float]:
    """How far one prompt a name, all that is trained here, makes T5 as it is write the names of the scenes.

    Loss of a token, and the share of the names of which every token is the likeliest: what a frozen language model can
    be told through the one position that a detector has.
    """
    t5 = T5(config.model.t5, config.model.text_width, lora=False, dtype=jnp.dtype(jnp.float32))
    tokenizer, names = ByteTokenizer(), [kind.name for kind in KINDS]
    spelled = [[*tokenizer.encode(name), END] for name in names]
    targets = np.array([[*tokens, *[PADDING] * (LONGEST - len(tokens))] for tokens in spelled], np.int32)
    optimizer = optax.adam(PROMPT_RATE)

    def losses(t5: T5, prompts, targets):
        return _written(t5, normalise_prompts(prompts)[:, None], targets)

    @jax.jit
    def step(prompts, state, targets):
        def loss(prompts):
            found, right = t5.apply({"params": params}, prompts, targets, method=losses)
            real = targets != PADDING
            return found.sum() / real.sum(), (right | ~real).all(1).mean()

        (value, whole), grads = jax.value_and_grad(loss, has_aux=True)(prompts)
        updates, state = optimizer.update(grads, state, prompts)
        return optax.apply_updates(prompts, updates), state, value, whole

    prompts = 0.1 * jax.random.normal(jax.random.key(SEED), (len(names), config.model.text_width))
    state, value, whole = optimizer.init(prompts), jnp.inf, 0.0
    for _ in range(PROMPT_STEPS):
        prompts, state, value, whole = step(prompts, state, targets)
    return {"loss": round(float(value), 4), "names_right": round(float(whole), 4)}


def random_t5(config: Config) -> dict[str, Any]:
    t5 = T5(config.model.t5, config.model.text_width, lora=False, dtype=jnp.dtype(jnp.float32))
    params: Any = t5.init(
        jax.random.key(SEED), *examples(["a", "b"], 1, np.random.default_rng(SEED)), method=token_losses
    )
    return params["params"]


def _split(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Those to train on, and those held out: none of the latter is a name of the scenes."""
    scenes = {kind.name for kind in KINDS}
    others = [name for name in names if name not in scenes]
    out = set(np.random.default_rng(SEED).permutation(others)[: round(HELD_OUT * len(names))].tolist())
    return [name for name in names if name not in out], sorted(out)


def load_t5() -> dict[str, Any]:
    """The parameters of `name_generator/t5`, without LoRA. Raises InputError where they are not there."""
    if not WEIGHTS.is_file():
        raise InputError(f"{WEIGHTS}: is not there; python -m experiments.ablations.pretrain makes it")
    return nested({path: value.astype(np.float32) for path, value in load_file(WEIGHTS).items()})


def draw(curve: list[dict[str, float]], found: dict[str, dict[str, dict[str, float]]]) -> None:
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot([point["step"] for point in curve], [point["loss"] for point in curve], color="#3b6ea5")
    left.set(xlabel="step", ylabel="loss of a token", yscale="log", title=f"span denoising, batches of {BATCH}")
    for title, lengths in found.items():
        right.plot([int(n) for n in lengths], [100 * v["right"] for v in lengths.values()], "o-", label=title)
    right.set(xlabel="tokens of the input, its mark included", ylabel="tokens right, %", title="after training")
    right.legend(fontsize=8)
    with replacing(PICTURE) as part:
        figure.savefig(part, dpi=110, format="png")


def main() -> None:
    config, began = parse_config(scenes_tiny.get_config()), time.monotonic()
    params, curve = pretrain(config)
    # What is saved is what is measured: rounded to bfloat16, half the size.
    rounded = {path: np.asarray(value).astype(ml_dtypes.bfloat16) for path, value in flat(params).items()}
    with replacing(WEIGHTS) as part:
        save_file(rounded, part)
    found = measure(config, load_t5())
    write_json(
        FIGURES,
        {
            "names": len(corpus()),
            "parameters": sum(value.size for value in rounded.values()),
            "steps": STEPS,
            "batch": BATCH,
            "seconds": round(time.monotonic() - began),
            "curve": curve,
            "of_input_length": found,
            "told_by_prompts": {
                "pre-trained": told_by_prompts(config, load_t5()),
                "random": told_by_prompts(config, random_t5(config)),
            },
        },
    )
    draw(curve, found)
    print(f"{WEIGHTS}: {len(corpus())} names, {STEPS} steps, loss of a token {curve[-1]['loss']:.3f}")


if __name__ == "__main__":
    main()
