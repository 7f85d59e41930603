"""metrics.jsonl: full precision, and no line twice after a restart."""

import json

from opendet_jax.train.curves import draw_curves
from opendet_jax.train.metrics import MetricsLog, read_metrics


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


def test_curves_are_drawn(tmp_path):
    lines = [{"step": s, "total": 9.0 / s, "l1/layer_1": 1.0 / s, "l1/layer_2": 2.0 / s} for s in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    draw_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 5000
