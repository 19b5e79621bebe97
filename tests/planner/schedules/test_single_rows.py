"""GPipe and 1F1B: goldens, properties, and torch's own schedules as the oracle."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.pipelining import ScheduleGPipe
from torch.distributed.pipelining.schedules import (
    _Action,
    _add_send_recv,
    _get_1f1b_rank_ops,
    _simulate_comms_compute,
    _validate_schedule,
)

from ipu_pipeline.ir.schedule import Action, Schedule
from ipu_pipeline.planner.schedules.build import build_schedule
from ipu_pipeline.planner.schedules.gpipe import forward_only, gpipe
from ipu_pipeline.planner.schedules.one_f_one_b import one_f_one_b

BUILDERS = {"gpipe": gpipe, "1f1b": one_f_one_b}
stages = st.integers(1, 9)
microbatches = st.integers(1, 17)
names = st.sampled_from(sorted(BUILDERS))


def torch_rows(name: str, num_stages: int, num_microbatches: int) -> list[list[str]]:
    """Rows of torch's own generators, without their waiting steps."""
    if name == "gpipe":
        schedule = object.__new__(ScheduleGPipe)  # its constructor wants a process group
        schedule._num_stages = num_stages
        schedule._n_microbatches = num_microbatches
        order = schedule._get_pipeline_order()
        rows = [order[rank] for rank in range(num_stages)]
    else:  # torch 2.13's Schedule1F1B shows a wrong row for its last rank; this is what it runs
        rows = [_torch_1f1b(rank, num_stages, num_microbatches) for rank in range(num_stages)]
    passes = ("FORWARD", "FULL_BACKWARD")
    return [[str(a) for a in row if a and a.computation_type.name in passes] for row in rows]


def _torch_1f1b(rank: int, num_stages: int, num_microbatches: int) -> list:
    warmup = min(num_stages - 1 - rank, num_microbatches)
    steady = num_microbatches - warmup
    return _get_1f1b_rank_ops(
        1, num_stages, warmup, steady, warmup, rank, lambda _: rank, lambda _: rank
    )


@pytest.mark.parametrize("name", sorted(BUILDERS))
@pytest.mark.parametrize(
    ("num_stages", "num_microbatches"), [(1, 3), (2, 2), (3, 7), (4, 8), (4, 2)]
)
def test_rows_are_those_of_torch(name: str, num_stages: int, num_microbatches: int) -> None:
    ours = [
        [str(action) for action in row] for row in BUILDERS[name](num_stages, num_microbatches).rows
    ]
    assert ours == torch_rows(name, num_stages, num_microbatches)


@pytest.mark.parametrize("name", sorted(BUILDERS))
@pytest.mark.parametrize(("num_stages", "num_microbatches"), [(2, 1), (4, 2), (3, 3), (4, 9)])
def test_torch_validates_and_simulates_them(
    name: str, num_stages: int, num_microbatches: int
) -> None:
    rows = {
        rank: [_Action.from_str(str(action)) for action in row]
        for rank, row in enumerate(BUILDERS[name](num_stages, num_microbatches).rows)
    }
    assert _validate_schedule(rows, num_stages, num_stages, num_microbatches) == {
        stage: stage for stage in range(num_stages)
    }
    with_comms = _add_send_recv(rows, stage_to_rank=lambda s: s, num_stages=num_stages)
    simulated = _simulate_comms_compute(
        with_comms, stage_to_rank=lambda s: s, num_stages=num_stages
    )
    computed = [a for row in simulated.values() for a in row if a and a.computation_type.name in
                ("FORWARD", "FULL_BACKWARD")]  # fmt: skip
    assert len(computed) == 2 * num_stages * num_microbatches


def test_torch_refuses_a_planted_fault() -> None:
    rows = {0: [_Action.from_str("0B0"), _Action.from_str("0F0")]}
    with pytest.raises(AssertionError):
        _validate_schedule(rows, 1, 1, 1)


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_golden_rows(golden, name: str) -> None:
    golden(f"schedule_{name}_4x6.csv", BUILDERS[name](4, 6).to_csv())


@given(names, stages, microbatches)
def test_no_deadlock_and_every_action_once(name: str, num_stages: int, num: int) -> None:
    order = BUILDERS[name](num_stages, num).total_order()
    wanted = {Action(s, k, m) for s in range(num_stages) for k in "FB" for m in range(num)}
    assert len(order) == len(wanted)
    assert set(order) == wanted


@given(stages, microbatches)
def test_1f1b_holds_as_few_microbatches_as_it_can(num_stages: int, num: int) -> None:
    schedule = one_f_one_b(num_stages, num)
    peaks = [schedule.peak_in_flight(stage) for stage in range(num_stages)]
    assert peaks == [min(num_stages - stage, num) for stage in range(num_stages)]


@given(stages, microbatches)
def test_gpipe_holds_all(num_stages: int, num: int) -> None:
    schedule = gpipe(num_stages, num)
    assert {schedule.peak_in_flight(stage) for stage in range(num_stages)} == {num}


@given(names, stages, microbatches)
def test_row_s_is_stage_s(name: str, num_stages: int, num: int) -> None:
    rows = BUILDERS[name](num_stages, num).rows
    assert [{action.stage for action in row} for row in rows] == [{s} for s in range(num_stages)]


def test_forward_only() -> None:
    schedule = forward_only(2, 3)
    assert schedule.to_csv() == "0F0,0F1,0F2\n1F0,1F1,1F2\n"
    assert len(schedule.total_order()) == 6


@pytest.mark.parametrize("build", [gpipe, one_f_one_b, forward_only])
def test_counts_below_one_are_refused(build) -> None:
    with pytest.raises(ValueError, match="num_stages must be at least 1, got 0"):
        build(0, 1)
    with pytest.raises(ValueError, match="num_microbatches must be at least 1, got -2"):
        build(1, -2)


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_found_by_name(name: str) -> None:
    assert build_schedule(name, 3, 4) == BUILDERS[name](3, 4)
    assert isinstance(build_schedule(name, 3, 4), Schedule)


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"schedule 'zigzag' is unknown; use one of .*1f1b"):
        build_schedule("zigzag", 2, 2)
