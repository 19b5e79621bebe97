"""Every schedule: torch's order and validator as the oracle, formulas, memory, refusals."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.pipelining.schedules import (
    _Action,
    _add_send_recv,
    _simulate_comms_compute,
    _validate_schedule,
)

from ipu_pipeline.ir.schedule import Action
from ipu_pipeline.planner.schedules import (
    PipelineShape,
    StagePrice,
    schedule_kind,
    schedule_names,
    step_seconds,
)
from ipu_pipeline.planner.schedules.rows import forward_only
from tests.planner.schedules.torch_oracle import shape_for, torch_rows

TORCH = [name for name in schedule_names() if schedule_kind(name).torch_class]
ONE_EACH = [(1, 1, 3), (2, 1, 2), (3, 1, 7), (4, 1, 8), (4, 1, 2)]
SEVERAL = [(1, 2, 4), (2, 2, 4), (2, 2, 7), (2, 3, 6), (3, 2, 5), (3, 2, 8), (4, 2, 3), (4, 2, 10),
           (4, 2, 16), (4, 4, 8), (5, 2, 11)]  # fmt: skip
CASES = ONE_EACH + SEVERAL
names = st.sampled_from(schedule_names())


def shapes(name: str) -> list[PipelineShape]:
    found = [shape_for(schedule_kind(name), *case) for case in CASES]
    return [shape for shape in found if shape is not None]


def test_every_class_of_torch_has_a_schedule() -> None:
    assert len(TORCH) == 7
    assert all(len(shapes(name)) >= 4 for name in TORCH)


@pytest.mark.parametrize("name", TORCH)
def test_rows_are_those_of_torch(name: str) -> None:
    kind = schedule_kind(name)
    for shape in shapes(name):
        ours = [[str(action) for action in row] for row in kind.rows(shape).rows]
        assert ours == torch_rows(kind, shape), shape


@pytest.mark.parametrize("name", TORCH)
def test_torch_validates_and_simulates_them(name: str) -> None:
    kind = schedule_kind(name)
    for shape in shapes(name):
        made = kind.rows(shape)
        rows = {n: [_Action.from_str(str(a)) for a in row] for n, row in enumerate(made.rows)}
        owner = dict(enumerate(shape.devices))
        counts = shape.num_devices, shape.num_stages, shape.num_microbatches
        assert _validate_schedule(rows, *counts) == owner
        where = {"stage_to_rank": owner.__getitem__, "num_stages": shape.num_stages}
        _simulate_comms_compute(_add_send_recv(rows, **where), **where)


def test_torch_refuses_a_planted_fault() -> None:
    rows = {0: [_Action.from_str("0B0"), _Action.from_str("0F0")]}
    with pytest.raises(AssertionError):
        _validate_schedule(rows, 1, 1, 1)


@pytest.mark.parametrize(
    ("name", "shape", "file"),
    [
        ("1f1b", (4, 6), "schedule_1f1b_4x6.csv"),
        ("gpipe", (4, 6), "schedule_gpipe_4x6.csv"),
        ("interleaved", (8, 8, (0, 1, 2, 3) * 2), "schedule_interleaved_8x8_on_4.csv"),
        ("zbv", (6, 6, (0, 1, 2, 2, 1, 0)), "schedule_zbv_6x6_on_3.csv"),
    ],
)
def test_golden_rows(golden, name: str, shape, file: str) -> None:
    golden(file, schedule_kind(name).rows(PipelineShape.of(*shape)).to_csv())


drawn = st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 24), st.booleans())


@given(names, drawn)
def test_every_pass_runs_once_and_nothing_deadlocks(name: str, case) -> None:
    *numbers, training = case
    shape = shape_for(schedule_kind(name), *numbers)
    if shape is None:
        return
    shape = PipelineShape.of(shape.num_stages, shape.num_microbatches, shape.devices,
                             training=training)  # fmt: skip
    made = schedule_kind(name).rows(shape)
    order = made.total_order()
    done = [(a.stage, a.result.kind, a.microbatch) for a in order if a.kind != "W"]
    wanted = [(s, kind, m) for s in range(shape.num_stages) for kind in "FB"[: 1 + training]
              for m in range(shape.num_microbatches)]  # fmt: skip
    assert sorted(done) == sorted(wanted)
    halves = [sorted((a.stage, a.microbatch) for a in order if a.kind == k) for k in "IW"]
    assert halves[0] == halves[1]
    first = list(dict.fromkeys(shape.devices))
    for device, row in zip(first, made.rows, strict=True):
        assert {shape.devices[action.stage] for action in row} == {device}


@given(names, drawn)
def test_in_flight_is_counted_from_the_rows(name: str, case) -> None:
    kind, shape = schedule_kind(name), shape_for(schedule_kind(name), *case[:3])
    if shape is not None:
        assert kind.in_flight(shape) == kind.rows(shape).peaks_in_flight


@pytest.mark.parametrize("name", schedule_names())
def test_in_flight_of_many_microbatches_needs_few_rows(name: str) -> None:
    kind = schedule_kind(name)
    loops = kind.stages_per_device[0]
    few, many = (shape_for(kind, 4, loops, count) for count in (64, 64_000))
    assert few is not None
    assert many is not None
    if name not in ("gpipe", "looped_bfs"):
        assert kind.in_flight(many) == kind.in_flight(few)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", schedule_names())
def test_the_form_is_the_replay_for_equal_stages(name: str, training: bool) -> None:
    kind = schedule_kind(name)
    tried = 0
    for devices in range(1, 6):
        for loops in range(1, 4):
            for count in range(1, 24):
                shape = shape_for(kind, devices, loops, count)
                if shape is None:
                    continue
                tried += 1
                shape = PipelineShape.of(shape.num_stages, count, shape.devices, training=training)
                one = StagePrice(0.25, 0.5 * training, 0.0, 0.0, 0.0, 0, ())
                times = [StagePrice.split(one.forward_s, one.backward_s)] * shape.num_stages
                form = kind.objective(shape).seconds(shape.devices, [one] * shape.num_stages)
                assert step_seconds(kind, shape, times) == pytest.approx(form, rel=1e-12), shape
    assert tried >= 23


BUBBLES = {
    "1f1b": (1, 3 * 3.0),
    "gpipe": (1, 3 * 3.0),
    "interleaved": (2, 3 * 3.0),
    "looped_bfs": (2, 3 * 3.0),
    "interleaved_zero_bubble": (2, 3 * 1.0),
    "zbv": (2, 3 * 1.0),
    "dualpipev": (2, 3 * 1.0),
    "popart": (1, 6 * 3.0 - 9.0),
}


@pytest.mark.parametrize("name", schedule_names())
def test_published_bubbles(name: str) -> None:
    """Four devices, F, I and W of one second per stage: what a device waits in one step."""
    loops, bubble_s = BUBBLES[name]
    shape = shape_for(schedule_kind(name), 4, loops, 16)
    assert shape is not None
    times = [StagePrice.split(1.0, 2.0)] * shape.num_stages
    step_s = step_seconds(schedule_kind(name), shape, times)
    assert step_s - 16 * loops * 3.0 == pytest.approx(bubble_s)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("interleaved", (5, 4, (0, 1, 0, 1, 0)), "5 stages do not fit 2 devices"),
        ("interleaved", (4, 7, (0, 1, 0, 1)), r"in 3 equal groups of at least 2: 7 microbatches "
                                              "do not divide; use a multiple of 2"),
        ("interleaved", (4, 4, (0, 1, 1, 0)), r"puts its stages on devices \[0, 1, 0, 1\], got"),
        ("zbv", (4, 4), "runs exactly 2 stages per device, which they visit in a V: 4 stages do"),
        ("dualpipev", (4, 3, (0, 1, 1, 0)), "at least as many microbatches as stages, got 3 micro"),
        ("popart", (3, 4), "3 stages as 5 pipeline stages and needs at least 5 microbatches"),
    ],
)  # fmt: skip
def test_what_a_schedule_cannot_run(name: str, shape, message: str) -> None:
    kind, asked = schedule_kind(name), PipelineShape.of(*shape)
    for refuse in (kind.rows, kind.objective):
        with pytest.raises(ValueError, match=message):
            refuse(asked)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1), "num_stages must be at least 1, got 0"),
        ((1, -2), "num_microbatches must be at least 1, got -2"),
        ((3, 9, (0, 1)), "stage_devices has 2 entries for 3 stages"),
    ],
)
def test_wrong_shapes(arguments, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PipelineShape.of(*arguments)


def test_forward_only() -> None:
    schedule = forward_only(2, 3)
    assert schedule.to_csv() == "0F0,0F1,0F2\n1F0,1F1,1F2\n"
    assert len(schedule.total_order()) == 6


def test_stages_on_shared_devices_become_one_row_each() -> None:
    rows = schedule_kind("1f1b").rows(PipelineShape.of(3, 4, (0, 1, 0))).rows
    assert [{action.stage for action in row} for row in rows] == [{0, 2}, {1}]
    assert rows[0][0] == Action(0, "F", 0)
