"""Preparing 20,000 images: memory stays where it is, and a second run gives the same files."""

import hashlib
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from opendet_jax.data.datasets import read_annotations
from tests.data import published

IMAGES, BOXES, NAMES = 20_000, 35, 5000
GROWTH = 64  # MiB: while shards are written, of about 170


def run(folder: Path, out: Path) -> list[int]:
    """Prepares as a user does; the process's memory in MiB from the first to the last finished shard."""
    paths = ["--annotations", str(folder / "objects.json"), "--images", str(folder), "--out", str(out)]
    line = [sys.executable, "-m", "opendet_jax.data", "prepare", "--dataset", "visual_genome", *paths]
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    memory = []
    while process.poll() is None:
        writing = (out / "visual_genome-train.array_record-00000-of-00064").exists() and not (
            out / "index.npz"
        ).exists()
        status = Path(f"/proc/{process.pid}/status").read_text()
        if writing and (found := re.search(r"VmRSS:\s+(\d+)", status)):
            memory.append(int(found[1]) // 1024)
        time.sleep(0.05)
    assert process.returncode == 0
    return memory


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.mark.slow
def test_twenty_thousand_images(tmp_path):
    published.visual_genome(tmp_path / "vg", IMAGES, BOXES, NAMES, size=64)
    memory = run(tmp_path / "vg", tmp_path / "first")
    assert len(memory) > 20
    assert max(memory) - memory[0] < GROWTH
    run(tmp_path / "vg", tmp_path / "second")
    assert digests(tmp_path / "first") == digests(tmp_path / "second")
    dataset, _ = read_annotations(tmp_path / "first", "")
    assert len(dataset) == IMAGES
    assert sum(len(record.boxes) for record in dataset.records) == IMAGES * BOXES
