"""The scaling study: what is there is not compiled again, what fails stops nothing; its tables."""

import json
import subprocess
import sys

import pytest

from experiments.scaling import draw
from experiments.scaling import run as study


def point(images: int, gib: float | None, config="swin_t", topology="v5e:2x2") -> dict:
    return {
        "config": config,
        "topology": topology,
        "mesh": {"data": 4, "fsdp": 1, "tensor": 1},
        "images_per_share": images,
        "memory": {"peak": None if gib is None else gib * 2**30},
        "memory_limit": 16 * 2**30,
        "fits": gib is not None and gib <= 16,
    }


def test_every_point_has_a_name_of_its_own():
    names = [one.name for one in study.POINTS]
    assert len(set(names)) == len(names) >= 10


def test_missing_points_are_compiled_and_failures_named(tmp_path, monkeypatch, capsys):
    first, second, third = study.POINTS[:3]
    monkeypatch.setattr(study, "FOLDER", tmp_path)
    monkeypatch.setattr(sys, "argv", ["run", first.name, second.name, third.name])
    (tmp_path / f"{first.name}.json").write_text("{}")
    started = []

    def run(command, **_):
        started.append(command)
        return subprocess.CompletedProcess(command, returncode=int(command == second.command()))

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(SystemExit, match=f"error: no result of {second.name}$"):
        study.main()
    assert started == [second.command(), third.command()]
    assert f"--json={tmp_path / third.name}.json" in third.command()
    assert "1 of 3 points are there" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["run", "nothing"])
    with pytest.raises(SystemExit, match="2"):
        study.main()


def test_the_largest_batch():
    found = [point(1, 6.0), point(2, 7.0), point(8, 19.0), point(2, None, "swin_l"), point(4, 9.0, topology="h100:1")]
    assert draw.largest_batches(found) == ["| swin_t | v5e:2x2 | data 4 | 1 fit, 2 fit, 8 do not | 6 | 2.00 |"]
    assert "| 1 fit, 2 fit | 11 | 1.00 |" in draw.largest_batches(found[:2])[0]


def test_a_page_with_points(tmp_path, monkeypatch):
    whole = point(2, 7.0) | {
        "bound": {"step_seconds": 0.5, "image_seconds": 0.25, "limit": "compute", "communication_share": 0.125},
        "flops": 1e12,
        "flops_counted_by": "trace",
        "compile_seconds": 61.0,
    }
    whole["memory"] |= {"parameters": 2**30, "optimizer": 2**31}
    for name, value in (("FOLDER", tmp_path), ("PAGE", tmp_path / "page.md"), ("PICTURE", tmp_path / "picture.png")):
        monkeypatch.setattr(draw, name, value)
    (tmp_path / "page.md").write_text(f"before\n{draw.BEGIN}old\n{draw.END}after\n")
    with pytest.raises(SystemExit, match="holds no point"):
        draw.main()
    for number, content in enumerate((whole, point(8, 19.0))):
        (tmp_path / f"{study.POINTS[number].name}.json").write_text(json.dumps(content))
    draw.main()
    page = (tmp_path / "page.md").read_text()
    assert page.startswith("before\n")
    assert page.endswith("after\n")
    assert "old" not in page
    assert "| swin_t | v5e:2x2 | data 4 | 2 | 7.0 (16) | 3.00 | 500 | 250.00 | compute \\* | 12% | 61 |" in page
    assert "| 8 | 19.0 (16), **does not fit** | – |" in page
    assert (tmp_path / "picture.png").stat().st_size > 10_000
