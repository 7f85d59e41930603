"""What the benchmarks count and print."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from benchmarks import batch_parts, gpu
from benchmarks.__main__ import COMPARISONS, PAGE, TABLES, filled
from benchmarks.comparison import Case, Ours, Result, compare, row
from benchmarks.multiply_adds import products, seconds_alone, total
from benchmarks.parts import own_seconds, profile, table


def test_multiply_adds_of_products_convolutions_and_loops():
    x = jnp.ones((5, 6))

    def function(x):
        y = x @ jnp.ones((6, 7))  # 210
        y, _ = jax.lax.scan(lambda y, _: (y @ jnp.ones((7, 7)), None), y, length=3)  # 3 × 245
        y = jax.lax.while_loop(lambda y: y.sum() < 0, lambda y: y @ jnp.ones((7, 7)), y)  # 4 × 245
        image = jax.lax.conv(jnp.ones((1, 2, 8, 8)), jnp.ones((3, 2, 3, 3)), (1, 1), "VALID")  # 36·3 × 18
        return y.sum() + image.sum()

    work = products(jax.jit(function), x, rounds=4)
    assert total(work) == 210 + 7 * 245 + 36 * 3 * 18
    assert len(work) == 3  # scan's and the while loop's are the same product
    assert seconds_alone(work) > 0


def test_a_comparison_is_a_row_of_the_table(monkeypatch):
    monkeypatch.setattr(
        "benchmarks.comparison.memory", lambda module, case, side, cores: {"ours": 0.5, "peer": 1.25}[side]
    )
    calls = []
    case = Case("sum", lambda: Ours(lambda: calls.append("ours"), 2.0), lambda: lambda: calls.append("peer"), least=0.5)
    result = compare(case, "nothing", 1, repeats=3)
    assert calls == ["ours", "peer"] + 3 * ["peer", "ours"]
    assert len(result.ratios) == 3
    cells = row(result).split(" | ")
    assert (cells[0], cells[4], cells[5], cells[6]) == ("| sum", "0.5", "2", "– / –")
    assert cells[7] == "1.25 / 0.5 |"


def test_results_that_differ_end_a_comparison():
    def differ(mine, theirs):
        raise AssertionError(f"{mine} is not {theirs}")

    case = Case("sum", lambda: Ours(lambda: 1, 0.0), lambda: lambda: 2, differ)
    with pytest.raises(AssertionError, match="1 is not 2"):
        compare(case, "nothing", 1)


def test_work_without_a_peer_has_no_ratio():
    result = Result("step", 2.0, [], None, None, 30.0, 1.0, 1.5, 4.0, None)
    assert row(result) == "| step | – | 2 | – | – | 30 | 0.50 / 0.75 | – / 4 |"


def test_the_page_has_a_place_for_each_table():
    page = PAGE.read_text(encoding="utf-8")
    for name in ("comparisons", *TABLES, "growth"):
        changed = filled(page, name, f"numbers of {name}")
        assert f"<!-- {name} -->\nnumbers of {name}\n<!-- /{name} -->\n" in changed
        assert filled(changed, name, "") == filled(page, name, "")  # all around it stays
    with pytest.raises(ValueError, match="no place for a table: <!-- speed -->"):
        filled(page, "speed", "")


@pytest.mark.parametrize("module", [*COMPARISONS, *TABLES, "growth", "gpu", "gpu_parts", "batch_parts"])
def test_every_benchmark_has_help(module):
    done = subprocess.run([sys.executable, "-m", f"benchmarks.{module}", "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"python -m benchmarks.{module}" in done.stdout


def test_the_loader_benchmark_draws_its_own_pictures():
    small = ("--scenes", "32", "--batches", "1", "--workers", "1")
    done = subprocess.run([sys.executable, "-m", "benchmarks.loader", *small], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "32 photographs, longer side 640 pixels" in done.stdout
    assert done.stdout.count("\n| 1 | ") == 1


@pytest.mark.slow  # it compiles a detector and a training step: two minutes
def test_the_gpu_page_runs_to_its_end_on_a_cpu(tmp_path):
    page = tmp_path / "gpu.md"
    command = [sys.executable, "-m", "benchmarks.gpu", "--tiny", "--minutes", "20", "--out", str(page)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = page.read_text(encoding="utf-8")
    assert "Cut off" not in text
    assert "Ended with an error" not in text, text
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows].count("| little") == 2 + 4
    float32 = next(row for row in rows if row[:2] == ["| little", "float32"])
    assert all(float(error) < 1e-6 for error in float32[2:6])
    assert [row[0] for row in rows if row[0].startswith("| 1 ×")] == ["| 1 × 32×32"]
    assert "| naming, 3 prompts, 2 beams, 2 tokens" in [row[0] for row in rows]
    said = [line.split()[-2:] for line in done.stdout.splitlines()]
    assert said == [["2", "rows."], ["4", "rows."], ["1", "rows."], ["2", "rows."]]


ROW = '{"use": "encoder", "ms": "1.0"}'


@pytest.mark.parametrize(
    ("end", "note"),
    [
        ("exec sleep 60", "Cut off after 1 s."),
        ("echo no memory >&2; exit 3", "Ended with an error (status 3): `no memory`"),
    ],
)
def test_a_part_that_does_not_end_leaves_the_rows_that_it_has(tmp_path, monkeypatch, end, note):
    program = tmp_path / "python"
    begun = """{"platform": "gpu", "device": "a GPU", "jax": "1"}"""
    program.write_text(f"#!/bin/sh\necho '{begun}'\necho '{ROW}'\nprintf '{{\"use'\n{end}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    device, outcome = gpu.measure(gpu.PARTS[0], 1.0, tiny=True)
    assert device["platform"] == "gpu"
    text = gpu.page("heading", [outcome])
    assert "| use | ms |\n| --- | --- |\n| encoder | 1.0 |" in text
    assert note in text


def test_without_a_gpu_nothing_is_measured():
    command = [sys.executable, "-m", "benchmarks.gpu", "--minutes", "1"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    assert done.returncode == 1
    assert "no GPU: jax finds cpu; --tiny tries the script without one" in done.stderr


def test_seconds_are_those_of_the_operation_itself():
    """On its thread, without what lies within it."""
    spans = [("a", 1, 0, 10), ("b", 1, 2, 3), ("c", 1, 3, 1), ("b", 1, 6, 2), ("a", 2, 4, 5), ("d", 1, 10, 1)]
    events = [{"name": n, "pid": 0, "tid": t, "ts": ts * 1e6, "dur": dur * 1e6} for n, t, ts, dur in spans]
    assert own_seconds(events) == {"a": 5 + 5, "b": 2 + 2, "c": 1, "d": 1}


def test_a_profile_by_part():
    """Forward and backward of two parts, by the names that the modules give their operations."""

    def train_step(x):
        with jax.named_scope("backbone"):
            x = jnp.sin(x @ x)
        with jax.named_scope("decoder/layer"):
            return jnp.cos(x @ x).sum()

    x = jnp.ones((400, 400))
    program = jax.jit(jax.grad(train_step)).lower(x).compile()
    parts = profile(lambda: jax.block_until_ready(program(x)), program.as_text())
    assert {"backbone", "backbone, backward", "decoder", "decoder, backward"} <= set(parts)
    assert all(seconds > 0 for seconds in parts.values())
    assert table(parts).count("\n") == len(parts) + 1


def test_multiply_adds_of_a_compiled_program_and_its_fusions():
    def function(x, image):
        y = jnp.tanh(x @ jnp.full((6, 7), 2.0)) * 3.0  # 5 · 6 · 7
        image = jax.lax.conv(image, jnp.full((3, 2, 3, 3), 2.0), (1, 1), "VALID")  # 36 · 3 × 18
        return jax.lax.while_loop(lambda y: y.sum() < 9.0, lambda y: y @ jnp.full((7, 7), 2.0), y), image  # 5 · 49 each

    text = jax.jit(function).lower(jnp.ones((5, 6)), jnp.ones((1, 2, 8, 8))).compile().as_text()
    events = {name: work for name, work in batch_parts.multiply_adds(text).items() if work}
    assert set(events.values()) >= {5 * 6 * 7, 36 * 3 * 18, 5 * 7 * 7}


def test_where_the_time_of_a_batch_goes():
    program = """
from dataclasses import asdict
import json
import opendet_jax
from benchmarks import batch_parts, batches
batches.detector_of = lambda size: opendet_jax.load("scenes_tiny")
way = batch_parts.measured(128, images=2, batch_size=1, rounds=2)
print(json.dumps([asdict(way), batch_parts.table({"one": way, "two": way}).splitlines()]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    way, rows = json.loads(done.stdout)
    parts = way["parts"]
    assert {"backbone", "encoder", "decoder", "distiller", "language model", batch_parts.HOST} < parts.keys()
    assert all(part["seconds"] > 0 for part in parts.values())
    assert sum(part["seconds"] for part in parts.values()) == pytest.approx(way["cpu_seconds"])
    assert 0.5 < way["threads"] < 64
    for name in ("backbone", "encoder", "decoder"):
        assert 0 < parts[name]["products"] <= parts[name]["seconds"]
        assert parts[name]["multiply_adds"] > 1e6
    assert len(rows) == 2 + len(parts) + 1
    assert rows[-1].startswith("| all | ")
    assert rows[-1].count("| 100% |") == 2
