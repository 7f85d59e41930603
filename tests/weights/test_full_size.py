"""Full-size files with random weights, saved by the real libraries: time and memory of converting them, and the whole
path from the authors' .pth to named boxes in photographs. Run by `make test-slow`; docs/weights.md has the numbers.
"""

import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import opendet_jax
from opendet_jax.checkpoints.folder import read_note

pytestmark = pytest.mark.slow

SECONDS, GIBIBYTES = 120, 12  # at most, for one conversion
PARAMETERS = {
    "t5": 247_577_856,
    "clip": 123_650_304,
    "swin_t": 27_520_506,
    "swin_b": 86_744_760,
    "opendet": 328_639_366,
}


def save_published(kind: str, folder: Path) -> Path:
    """What the hub would give, with random numbers."""
    from transformers import (
        CLIPTextConfig,
        CLIPTextModelWithProjection,
        SwinConfig,
        SwinModel,
        T5Config,
        T5ForConditionalGeneration,
    )

    torch.manual_seed(0)
    if kind == "t5":
        sizes = {"d_model": 768, "d_kv": 64, "d_ff": 2048, "num_layers": 12, "num_heads": 12, "vocab_size": 32128}
        model = T5ForConditionalGeneration(T5Config(**sizes, feed_forward_proj="gated-gelu", tie_word_embeddings=False))
    elif kind == "clip":
        model = CLIPTextModelWithProjection(
            CLIPTextConfig(
                hidden_size=768,
                intermediate_size=3072,
                num_hidden_layers=12,
                num_attention_heads=12,
                projection_dim=768,
            )
        )
    else:
        embed_dim, blocks, heads = {"swin_t": (96, 6, 3), "swin_b": (128, 18, 4)}[kind]
        depths, num_heads = [2, 2, blocks, 2], [heads, 2 * heads, 4 * heads, 8 * heads]
        model = SwinModel(SwinConfig(embed_dim=embed_dim, depths=depths, num_heads=num_heads, window_size=7))
    model.save_pretrained(folder)
    return folder


def save_authors(vectors_folder: Path, file: Path) -> Path:
    """A training file with every name of the authors' full checkpoint; shared tensors are shared."""
    rng, state, shared = np.random.default_rng(0), {}, {}
    for line in (vectors_folder / "official_state_dict.txt").read_text().splitlines():
        if line.startswith("#") or not line.strip():
            continue
        name, shape, dtype, *canonical = line.split("\t")
        if canonical:
            shared[name] = canonical[0]
            continue
        sides = tuple(int(n) for n in shape.strip("()").split(",") if n.strip())
        value = rng.standard_normal(sides, np.float32) / np.sqrt(sides[-1]) if len(sides) > 1 else np.ones(sides)
        state[name] = torch.from_numpy(value.astype(dtype))
    state |= {name: state[canonical] for name, canonical in shared.items()}
    torch.save({"model": state, "iteration": 299_999}, file)
    return file


def convert(kind: str, source: Path, out: Path, *more: str) -> None:
    """In a process of its own, whose time and peak memory are its own."""
    script = "import resource, sys; from opendet_jax.weights.__main__ import main; main(sys.argv[1:]);"
    script += "print('KiB', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    arguments = ["convert", "--from", kind.partition("_")[0], "--source", str(source), "--out", str(out), *more]
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
    seconds = time.monotonic() - started
    assert done.returncode == 0, done.stderr[-3000:]
    peak = int(done.stdout.split("KiB")[-1]) / 2**20
    print(f"{kind}: {PARAMETERS[kind]:,} parameters, {seconds:.0f} s, {peak:.1f} GiB")
    assert read_note(out)["parameters"] == PARAMETERS[kind]
    assert seconds < SECONDS
    assert peak < GIBIBYTES


@pytest.mark.parametrize("kind", ["t5", "clip", "swin_t", "swin_b"])
def test_published_parts(tmp_path, kind):
    convert(kind, save_published(kind, tmp_path / "source"), tmp_path / "out")


def test_the_authors_file_detects_and_names(tmp_path, vectors_folder, data_folder):
    source = save_authors(vectors_folder, tmp_path / "model_0299999.pth")
    convert("opendet", source, tmp_path / "out", "--tokenizer", str(data_folder / "tokenizers" / "t5"))
    source.unlink()
    detector = opendet_jax.load(tmp_path / "out")
    photographs = [path for path in sorted((data_folder / "demo").iterdir()) if path.suffix in (".jpg", ".png")]
    assert len(photographs) == 7
    for photograph in photographs:
        started = time.monotonic()
        found = detector.detect(photograph, max_detections=20, min_score=0.0)
        seconds = time.monotonic() - started
        with Image.open(photograph) as image:
            width, height = image.size
        print(f"{photograph.name} {width}×{height}: {len(found)} objects, {seconds:.0f} s")
        assert len(found) == 20
        assert np.isfinite(found.boxes).all()
        assert (found.boxes >= 0).all()
        assert (found.boxes <= (width, height, width, height)).all()
        assert np.isfinite(found.name_scores).all()
        assert all(len(others) == 2 for others in found.alternatives)
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")
