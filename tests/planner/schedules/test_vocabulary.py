"""The passes of a spread vocabulary: in every schedule, in an order that can run, simulated."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from ipu_pipeline.errors import VerifyError
from ipu_pipeline.ir.schedule import Action, Schedule
from ipu_pipeline.planner.schedules import (
    PipelineShape,
    StagePrice,
    schedule_kind,
    schedule_names,
    step_seconds,
)
from ipu_pipeline.planner.schedules.replay import program, start_times
from ipu_pipeline.planner.schedules.rows import MOST_KEPT, with_vocabulary

ASYNCHRONOUS = [name for name in schedule_names() if not schedule_kind(name).lock_stepped]


def spread_shape(name: str, num_microbatches: int = 8) -> PipelineShape:
    kind = schedule_kind(name)
    depth = 2 * max(kind.stages_per_device)
    devices = kind.place(depth, 2)
    assert devices is not None
    return PipelineShape.of(depth, num_microbatches, devices, spread=range(depth))


@pytest.mark.parametrize("name", ASYNCHRONOUS)
def test_every_schedule_runs_them(name: str) -> None:
    shape = spread_shape(name)
    kind = schedule_kind(name)
    rows = kind.rows(shape)
    plain = kind.rows(replace(shape, spread=()))
    for own, before in zip(rows.rows, plain.rows, strict=True):
        for kinds in ("F", "BIW"):  # which keep their order
            assert [a for a in own if a.kind in kinds] == [a for a in before if a.kind in kinds]
    counted = Counter((a.stage, a.kind) for row in rows.rows for a in row if a.kind in "ST")
    assert counted == {(s, k): 8 for s in range(shape.num_stages) for k in "ST"}
    place = {a: n for n, a in enumerate(rows.total_order())}
    last = shape.num_stages - 1
    for action, position in place.items():
        for needed in rows.requirements(action):
            split = Action(needed.stage, "I", needed.microbatch)
            assert place.get(needed, place.get(split, -1)) < position
    for microbatch in range(8):
        softmaxes = [place[Action(s, "S", microbatch)] for s in range(shape.num_stages)]
        assert place[Action(last, "F", microbatch)] < min(softmaxes)
    peaks = zip(plain.peaks_in_flight, rows.peaks_in_flight, strict=True)
    assert all(less <= more <= less + 1 for less, more in peaks)


@pytest.mark.parametrize("name", ASYNCHRONOUS)
def test_of_many_microbatches_the_steady_state_is_continued(name: str) -> None:
    kind, shape = schedule_kind(name), spread_shape(name, 200)
    depth = shape.num_stages
    prices = [replace(StagePrice.split(1.0, 2.0), softmax_s=0.75, rows_s=0.5)] * depth
    rows = kind.rows(shape)
    whole = start_times(program(rows), [s for price in prices for s in price.by_kind])[1]
    assert step_seconds(kind, shape, prices) == pytest.approx(whole, rel=1e-9)
    without = step_seconds(kind, replace(shape, spread=()), prices)
    work = 200 * (depth // 2) * 1.25
    assert without + work <= whole + 1e-9 < without + 1.5 * work


def test_the_backward_pass_waits_for_all_of_them() -> None:
    rows = schedule_kind("1f1b").rows(PipelineShape.of(2, 3, spread=(0, 1)))
    needed = rows.requirements(Action(1, "B", 2))
    assert needed == {Action(1, "F", 2), Action(0, "S", 2), Action(1, "S", 2)}
    assert rows.requirements(Action(0, "S", 2)) == {Action(1, "F", 2)}
    assert rows.requirements(Action(0, "T", 2)) == {Action(0, "S", 2), Action(1, "B", 2)}
    assert rows.to_csv() == (
        "0F0,0F1,0S0,0F2,0S1,0T0,0B0,0S2,0T1,0B1,0B2,0T2\n"
        "1F0,1S0,1F1,1S1,1B0,1T0,1F2,1S2,1B1,1T1,1B2,1T2\n"
    )


def test_few_softmaxes_are_kept() -> None:
    for name in ASYNCHRONOUS:
        for row in schedule_kind(name).rows(spread_shape(name)).rows:
            kept: Counter[int] = Counter()
            for action in row:
                kept[action.stage] += {"S": 1, "T": -1}.get(action.kind, 0)
                assert kept[action.stage] <= MOST_KEPT


def test_inference_has_none() -> None:
    shape = PipelineShape.of(2, 3, training=False, spread=(0, 1))
    assert all(a.kind == "F" for row in schedule_kind("gpipe").rows(shape).rows for a in row)


def test_what_cannot_run_them() -> None:
    shape = PipelineShape.of(2, 4, spread=(0, 1))
    assert "leaves no place for the passes" in schedule_kind("popart").problem(shape)
    backwards = Schedule("own", 1, 1, ((Action(0, "B", 0), Action(0, "F", 0)),))
    with pytest.raises(VerifyError, match="its vocabulary passes find no place"):
        with_vocabulary(backwards, (0,))
