from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipu_pipeline.errors import VerifyError
from ipu_pipeline.ir.schedule import Action, Schedule
from ipu_pipeline.planner.schedules import PipelineShape, schedule_kind
from ipu_pipeline.planner.schedules.rows import one_row_per_device


def one_f_one_b(stages, microbatches) -> Schedule:
    return schedule_kind("1f1b").rows(PipelineShape.of(stages, microbatches))


def gpipe(stages, microbatches) -> Schedule:
    return schedule_kind("gpipe").rows(PipelineShape.of(stages, microbatches))


def test_rows_of_their_own_stay() -> None:
    schedule = one_f_one_b(3, 4)
    assert one_row_per_device(schedule, [2, 0, 1]) is schedule


@given(
    st.sampled_from([one_f_one_b, gpipe]),
    st.integers(1, 7),
    st.lists(st.integers(0, 2), min_size=1, max_size=6),
)
def test_merged_rows_hold_everything_and_can_run(builder, num_microbatches, devices) -> None:
    schedule = builder(len(devices), num_microbatches)
    merged = one_row_per_device(schedule, devices)
    assert len(merged.rows) == len(set(devices))
    assert sorted(merged.total_order()) == sorted(a for row in schedule.rows for a in row)
    for row in merged.rows:
        assert len({devices[action.stage] for action in row}) == 1
        for stage in {action.stage for action in row}:
            assert tuple(a for a in row if a.stage == stage) == schedule.rows[stage]


def test_a_row_on_two_devices_is_refused() -> None:
    row = (Action(0, "F", 0), Action(1, "F", 0))
    with pytest.raises(ValueError, match=r"one row of the schedule holds stages of devices \[0, 1"):
        one_row_per_device(Schedule("x", 2, 1, (row,)), [0, 1])


def test_a_deadlock_is_named() -> None:
    rows = ((Action(0, "B", 0), Action(0, "F", 0)), (Action(1, "F", 0), Action(1, "B", 0)))
    with pytest.raises(VerifyError, match="deadlocks with 4 actions left"):
        one_row_per_device(Schedule("x", 2, 1, rows), [0, 0])
