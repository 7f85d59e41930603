"""A stage of the ladder that no test enters fails a run of all of it."""

from pathlib import Path

import pytest

from tests.parity.plugin import FAST, LADDER
from tests.parity.report import STAGES, STEPS, Row, missing

ONE_STEP = [stage for stage in STAGES if not stage.startswith(STEPS)]


def rows(stages: list[str]) -> list[Row]:
    return [Row(stage, "a file", 0.0, 0.0, 1e-5, False) for stage in stages]


def test_nothing_is_missing_where_every_stage_was_entered():
    assert missing(rows(list(STAGES))) == missing(rows(list(STAGES)), fast=True) == []


def test_what_fast_tests_leave_out_is_several_steps_of_training():
    assert missing(rows(ONE_STEP), fast=True) == []
    left_out = missing(rows(ONE_STEP))
    assert left_out == [stage for stage in STAGES if stage.startswith(STEPS)]
    assert len(left_out) == 10


@pytest.mark.parametrize("fast", [True, False])
def test_a_stage_without_a_test_is_missed(fast):
    entered = rows([stage for stage in STAGES if stage != "prompts"])
    assert missing(entered, fast) == ["prompts"]


def test_the_commands_ask_for_what_the_plugin_looks_for():
    """`make test` without what takes minutes, `make parity` with it."""
    makefile = (Path(__file__).parents[2] / "Makefile").read_text()
    assert f'-m "{FAST}"\n' in makefile
    assert f'-m "{LADDER}" tests/parity' in makefile
