"""Schedules are found by name: files of the package, and entry points of others."""

from __future__ import annotations

import sys

import pytest

from ipu_pipeline.planner.schedules import schedule_kind, schedule_names
from tests.planner.schedules.outside import one_by_one


@pytest.fixture(name="one_by_one")
def _installed(tmp_path):
    with one_by_one(tmp_path) as name:
        yield name


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
