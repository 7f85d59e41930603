"""metrics.jsonl and evaluations.jsonl: full precision, and no line twice after a restart."""

import json
import subprocess
import sys

import pytest
from matplotlib.figure import Figure
from PIL import Image

from opendet_jax.train.metrics import LogError, MetricsLog, best_step, draw_curves, read_metrics


def test_lines_after_the_restored_step_are_dropped(tmp_path):
    log = MetricsLog(tmp_path, 0)
    for step in (10, 20, 30):
        log.write(step, {"total": 1 / 3 + step})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "tot')  # cut off by a kill
    log = MetricsLog(tmp_path, 20)
    log.write(30, {"total": 0.5})
    log.close()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [10, 20, 30]
    assert rows[0]["total"] == 1 / 3 + 10
    assert rows[2]["total"] == 0.5


def test_only_finite_numbers_are_written(tmp_path):
    """The file stays json."""
    log = MetricsLog(tmp_path, 0)
    log.write(1, {"total": float("nan"), "naming": 2.0, "l1/layer_1": float("inf")})
    log.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "naming": 2.0}\n'


def test_an_evaluation_takes_the_place_of_an_earlier_one(tmp_path):
    log = MetricsLog(tmp_path, 0)
    metrics = {"step": 5, "name_mapping": "exact", "AP": 0.25, "APr": None, "images": 3, "alignment": {"a": 1.0}}
    log.evaluated(5, metrics)
    log.evaluated(10, metrics | {"AP": 0.5})
    log.evaluated(10, metrics | {"AP": 0.125})
    log.close()
    rows = read_metrics(tmp_path / "evaluations.jsonl")
    assert rows == [{"step": 5, "AP": 0.25, "images": 3}, {"step": 10, "AP": 0.125, "images": 3}]
    assert best_step(tmp_path, "AP", [5, 10, 15]) == 5
    assert best_step(tmp_path, "AP", [10, 15]) == 10
    assert best_step(tmp_path, "images", [5, 10]) == 10, "of equals the newer"
    assert best_step(tmp_path, "AP", [15]) is None
    assert best_step(tmp_path, "APr", [5, 10]) is None
    assert best_step(tmp_path / "nothing", "AP", [5]) is None


def test_a_folder_that_is_gone(tmp_path):
    log = MetricsLog(tmp_path, 0)
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.raises(LogError, match=r"metrics\.jsonl: is gone"):
        log.write(1, {"total": 1.0})
    log.close()


@pytest.fixture
def panels(monkeypatch):
    """What draw_curves shows, by the titles of its panels: the labels of their lines, with their points."""
    shown = {}
    savefig = Figure.savefig

    def look(figure, *arguments, **options):
        shown.clear()
        for axis in figure.axes:
            shown[axis.get_title()] = {line.get_label(): line.get_xydata().tolist() for line in axis.lines}
        savefig(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", look)
    return shown


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_curves_of_losses_rates_and_evaluations(tmp_path, panels):
    lines = [{"step": s, "total": 9.0 / s, "l1/layer_1": 1.0 / s, "l1/layer_2": 2.0 / s, "skipped": 0} for s in (1, 2)]
    lines.append({"step": 3, "naming": 1.0, "learning_rate/detector": 1e-3, "learning_rate/backbone": 1e-4})
    write_lines(tmp_path / "metrics.jsonl", lines)
    draw_curves(tmp_path)
    assert panels.keys() == {"total", "l1", "naming", "learning rate"}  # no panel without a line
    assert panels["l1"] == {"layer_1": [[1, 1], [2, 0.5]], "layer_2": [[1, 2], [2, 1]]}
    write_lines(
        tmp_path / "evaluations.jsonl", [{"step": 2, "AP": 0.125, "AP50": 0.25, "APr": 1.0}, {"step": 3, "AP": 0.5}]
    )
    draw_curves(tmp_path)
    assert panels["evaluation, percent"] == {"AP": [[2, 12.5], [3, 50]], "AP50": [[2, 25]]}
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width > 1000


def test_there_is_nothing_to_draw(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    draw_curves(tmp_path)
    assert not (tmp_path / "curves.png").exists()


FULL = """
import errno, sys, time
from pathlib import Path
from tensorboardX.event_file_writer import EventsWriter
from opendet_jax.train.metrics import LogError, MetricsLog

def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")

log = MetricsLog(Path(sys.argv[1]), 0)
EventsWriter.write_event = full
numbers = {f"term {i}": 1.0 for i in range(2000)}  # more than a pipe holds
try:
    for step in range(1, 1000):
        log.write(step, numbers)
        time.sleep(0.01)
except LogError as error:
    print(error)
log.close()
"""


def test_a_disk_that_is_full_for_tensorboard_alone(tmp_path):
    """Its thread dies, and its queue of numbers must not be waited for, at the end of the process neither."""
    done = subprocess.run([sys.executable, "-c", FULL, tmp_path], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'tensorboard'}: could not be written; is the disk full?\n"
