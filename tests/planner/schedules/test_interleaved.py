"""Interleaved 1F1B: torch's order and validator as the oracle, goldens, properties, refusals."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.pipelining.schedules import (
    ScheduleInterleaved1F1B,
    _Action,
    _add_send_recv,
    _simulate_comms_compute,
    _validate_schedule,
)

from ipu_pipeline.ir.schedule import Schedule
from ipu_pipeline.planner.schedules.build import build_schedule
from ipu_pipeline.planner.schedules.interleaved import interleaved

CASES = [(2, 2, 4), (2, 3, 6), (3, 2, 5), (4, 2, 3), (4, 2, 10), (4, 4, 8), (1, 3, 4), (3, 1, 6)]


def torch_rows(num_devices: int, num_loops: int, num_microbatches: int) -> list[list[str]]:
    """Rows of torch's schedule without its waiting steps."""
    schedule = object.__new__(ScheduleInterleaved1F1B)  # its constructor wants a process group
    schedule.pp_group_size = num_devices
    schedule.n_local_stages = num_loops
    schedule._n_microbatches = num_microbatches
    schedule.number_of_rounds = max(1, num_microbatches // num_devices)
    schedule.microbatches_per_round = num_microbatches // schedule.number_of_rounds
    return [
        [str(action) for action in schedule._calculate_single_rank_operations(rank) if action]
        for rank in range(num_devices)
    ]


@pytest.mark.parametrize(("num_devices", "num_loops", "num_microbatches"), CASES)
def test_rows_are_those_of_torch(num_devices, num_loops, num_microbatches) -> None:
    made = interleaved(num_devices * num_loops, num_microbatches, num_devices)
    ours = [[str(action) for action in row] for row in made.rows]
    assert ours == torch_rows(num_devices, num_loops, num_microbatches)


@pytest.mark.parametrize(("num_devices", "num_loops", "num_microbatches"), CASES)
def test_torch_validates_and_simulates_them(num_devices, num_loops, num_microbatches) -> None:
    num_stages = num_devices * num_loops
    made = interleaved(num_stages, num_microbatches, num_devices)
    rows = {
        rank: [_Action.from_str(str(action)) for action in row]
        for rank, row in enumerate(made.rows)
    }
    owner = {stage: stage % num_devices for stage in range(num_stages)}
    assert _validate_schedule(rows, num_devices, num_stages, num_microbatches) == owner
    with_comms = _add_send_recv(rows, stage_to_rank=owner.__getitem__, num_stages=num_stages)
    _simulate_comms_compute(with_comms, stage_to_rank=owner.__getitem__, num_stages=num_stages)


def test_golden_rows(golden) -> None:
    golden("schedule_interleaved_8x8_on_4.csv", interleaved(8, 8, 4).to_csv())


@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 30))
def test_every_pass_runs_once_and_nothing_deadlocks(num_devices, num_loops, num_microbatches):
    if num_microbatches % max(1, num_microbatches // num_devices):
        return
    num_stages = num_devices * num_loops
    made = interleaved(num_stages, num_microbatches, num_devices)
    order = made.total_order()
    assert len(set(order)) == len(order) == 2 * num_stages * num_microbatches
    for device, row in enumerate(made.rows):
        assert {action.stage % num_devices for action in row} == {device}
        for stage in range(device, num_stages, num_devices):
            for kind in "FB":
                numbers = [a.microbatch for a in row if (a.stage, a.kind) == (stage, kind)]
                assert numbers == list(range(num_microbatches))
    assert Schedule.from_csv("interleaved", made.to_csv()) == made


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 4, 1), "num_stages must be at least 1, got 0"),
        ((4, 0, 2), "num_microbatches must be at least 1, got 0"),
        ((5, 4, 2), "5 stages do not divide among 2 devices"),
        ((4, 4, 0), "4 stages do not divide among 0 devices"),
        ((4, 7, 2), r"in 3 equal groups of at least 2: 7 microbatches do not divide; use a mult"),
    ],
)
def test_refusals(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        interleaved(*arguments)


def test_build_reads_the_number_of_devices_from_the_stages() -> None:
    loops = [0, 1, 2, 0, 1, 2]
    assert build_schedule("interleaved", 6, 6, loops) == interleaved(6, 6, 3)
    assert build_schedule("interleaved", 3, 6) == interleaved(3, 6, 3)
    with pytest.raises(ValueError, match=r"stages on devices \[0, 1, 1, 0\] must be on \[0, 1, 0,"):
        build_schedule("interleaved", 4, 4, [0, 1, 1, 0])
