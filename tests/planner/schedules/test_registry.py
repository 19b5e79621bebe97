"""Schedules are found by name: files of the package, and entry points of others."""

from __future__ import annotations

import sys

import pytest

from ipu_pipeline.planner.schedules import schedule_kind, schedule_names

MINE = '''
from ipu_pipeline.ir.schedule import Action, Schedule
from ipu_pipeline.planner.schedules.kind import ScheduleKind
from ipu_pipeline.planner.schedules.objective import Objective


def rows(shape):
    """One microbatch at a time."""
    made = tuple(
        tuple(Action(s, kind, m) for m in range(shape.num_microbatches) for kind in "FB")
        for s in range(shape.num_stages)
    )
    return Schedule("one_by_one", shape.num_stages, shape.num_microbatches, made)


SCHEDULE = ScheduleKind(
    name="one_by_one",
    make_rows=rows,
    make_objective=lambda s: Objective.paced(0, s.num_microbatches, s.num_stages),
    any_devices=True,
)
'''


@pytest.fixture
def one_by_one(tmp_path, monkeypatch):
    """A distribution with one schedule, installed in a temporary folder."""
    (tmp_path / "mine_of_test.py").write_text(MINE)
    info = tmp_path / "mine_of_test-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine_of_test\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[ipu_pipeline.schedules]\none_by_one = mine_of_test:SCHEDULE\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield "one_by_one"
    sys.modules.pop("mine_of_test", None)


def test_names() -> None:
    assert schedule_names() == (
        "1f1b", "gpipe", "dualpipev", "interleaved", "interleaved_zero_bubble", "looped_bfs",
        "popart", "zbv",
    )  # fmt: skip
    for name in schedule_names():
        assert schedule_kind(name).name == name
        assert schedule_kind(name).summary


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"schedule 'zigzag' is unknown; use one of 1f1b, gpipe,"):
        schedule_kind("zigzag")


def test_a_schedule_from_outside_is_found(one_by_one: str) -> None:
    assert schedule_names()[-1] == one_by_one
    assert schedule_kind(one_by_one).stages_per_device == (1,)


def test_an_entry_point_to_something_else_is_refused(one_by_one: str, monkeypatch) -> None:
    schedule_kind(one_by_one)
    monkeypatch.setattr(sys.modules["mine_of_test"], "SCHEDULE", 3)
    with pytest.raises(ValueError, match=r"'one_by_one' of group .*schedules gives int; it must"):
        schedule_names()
