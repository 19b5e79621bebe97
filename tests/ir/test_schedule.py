from __future__ import annotations

import pytest

from ipu_pipeline.errors import VerifyError
from ipu_pipeline.ir.schedule import Action, Schedule, requirements
from ipu_pipeline.planner.schedules import PipelineShape, schedule_kind


def one_f_one_b(stages, microbatches) -> Schedule:
    return schedule_kind("1f1b").rows(PipelineShape.of(stages, microbatches))


def gpipe(stages, microbatches) -> Schedule:
    return schedule_kind("gpipe").rows(PipelineShape.of(stages, microbatches))


def written(text: str) -> Schedule:
    """Read what ``Schedule.to_csv`` writes, of one-digit numbers."""
    rows = tuple(
        tuple(Action(int(cell[0]), cell[1], int(cell[2])) for cell in line.split(","))
        for line in text.splitlines()
    )
    actions = [action for row in rows for action in row]
    stages, microbatches = ({getattr(a, name) for a in actions} for name in ("stage", "microbatch"))
    return Schedule("written", len(stages), len(microbatches), rows)


@pytest.mark.parametrize("build", [gpipe, one_f_one_b])
def test_the_text_form_says_all(build) -> None:
    schedule = build(3, 5)
    assert written(schedule.to_csv()).rows == schedule.rows


def test_deadlock_names_who_waits_for_what() -> None:
    schedule = written("0F0,0B0\n1B0,1F0\n")
    with pytest.raises(VerifyError, match="deadlocks: device 0 at 0B0; device 1 at 1B0 cannot"):
        schedule.total_order()


def test_missing_action_is_a_deadlock() -> None:
    with pytest.raises(VerifyError, match="device 0 at 1F0 cannot start"):
        Schedule("half", 2, 1, ((Action(1, "F", 0),),)).total_order()


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
    mixed = written("0F0,0I0,0W0\n1F0,1B0\n")
    assert [str(action) for action in mixed.total_order()] == ["0F0", "1F0", "1B0", "0I0", "0W0"]
    assert mixed.peaks_in_flight == (1, 1)


def test_peak_in_flight_counts_one_stage_only() -> None:
    assert [one_f_one_b(4, 8).peak_in_flight(stage) for stage in range(4)] == [4, 3, 2, 1]
    assert [gpipe(4, 8).peak_in_flight(stage) for stage in range(4)] == [8] * 4
