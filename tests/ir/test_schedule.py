from __future__ import annotations

import pytest

from ipu_pipeline.errors import VerifyError
from ipu_pipeline.ir.schedule import Action, Schedule, dry_run, requirements
from ipu_pipeline.planner.schedules import PipelineShape, schedule_kind


def one_f_one_b(stages, microbatches) -> Schedule:
    return schedule_kind("1f1b").rows(PipelineShape.of(stages, microbatches))


def gpipe(stages, microbatches) -> Schedule:
    return schedule_kind("gpipe").rows(PipelineShape.of(stages, microbatches))


def test_action_text_round_trip() -> None:
    for action in (Action(0, "F", 0), Action(12, "B", 34), Action(1, "I", 2), Action(0, "W", 9)):
        assert Action.parse(str(action)) == action
    assert Action.parse(" 1B2 ") == Action(1, "B", 2)


@pytest.mark.parametrize("text", ["", "F", "1F", "F1", "1X2", "-1F0", "1F2x"])
def test_wrong_action_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no action; write stage, F, B, I or W, microbatch"):
        Action.parse(text)


@pytest.mark.parametrize("build", [gpipe, one_f_one_b])
def test_csv_round_trip(build) -> None:
    schedule = build(3, 5)
    assert Schedule.from_csv(schedule.name, schedule.to_csv()) == schedule


def test_csv_skips_empty_cells_and_refuses_nothing_at_all() -> None:
    schedule = Schedule.from_csv("odd", "0F0,,0B0,\n\n,1F0,1B0\n")
    assert [len(row) for row in schedule.rows] == [2, 2]
    with pytest.raises(ValueError, match="needs at least one action"):
        Schedule.from_csv("odd", ",\n\n")


def test_deadlock_names_who_waits_for_what() -> None:
    schedule = Schedule.from_csv("bad", "0F0,0B0\n1B0,1F0\n")
    with pytest.raises(VerifyError, match="deadlocks: device 0 at 0B0; device 1 at 1B0 cannot"):
        schedule.total_order()


def test_missing_action_is_a_deadlock() -> None:
    with pytest.raises(VerifyError, match="device 0 at 1F0 cannot start"):
        dry_run([[Action(1, "F", 0)]], 2)


def test_total_order_obeys_rows_and_requirements() -> None:
    schedule = one_f_one_b(3, 4)
    order = schedule.total_order()
    done: set[Action] = set()
    for action in order:
        assert requirements(action, 3) <= done
        done.add(action.result)
    for row in schedule.rows:
        assert [action for action in order if action in row] == list(row)


def test_requirements() -> None:
    assert requirements(Action(0, "F", 2), 3) == frozenset()
    assert requirements(Action(1, "F", 2), 3) == {Action(0, "F", 2)}
    assert requirements(Action(2, "B", 2), 3) == {Action(2, "F", 2)}
    assert requirements(Action(1, "B", 2), 3) == {Action(1, "F", 2), Action(2, "B", 2)}
    assert requirements(Action(1, "I", 2), 3) == requirements(Action(1, "B", 2), 3)
    assert requirements(Action(1, "W", 2), 3) == {Action(1, "I", 2).result}


def test_either_backward_pass_is_what_the_stage_before_waits_for() -> None:
    mixed = Schedule.from_csv("mixed", "0F0,0I0,0W0\n1F0,1B0\n")
    assert [str(action) for action in mixed.total_order()] == ["0F0", "1F0", "1B0", "0I0", "0W0"]
    assert mixed.peaks_in_flight == (1, 1)


def test_peak_in_flight_counts_one_stage_only() -> None:
    assert [one_f_one_b(4, 8).peak_in_flight(stage) for stage in range(4)] == [4, 3, 2, 1]
    assert [gpipe(4, 8).peak_in_flight(stage) for stage in range(4)] == [8] * 4
