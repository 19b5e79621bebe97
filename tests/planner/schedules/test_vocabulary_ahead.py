"""One forward pass ahead, where the vocabulary is spread over stages."""

from __future__ import annotations

from itertools import pairwise

import pytest

from ipu_pipeline.planner.schedules import (
    PipelineShape,
    critical_paths,
    schedule_kind,
    step_seconds,
)
from ipu_pipeline.planner.schedules.objective import StagePrice
from ipu_pipeline.planner.schedules.rows import one_forward_ahead

NAMES = ("1f1b", "gpipe", "looped_bfs", "interleaved", "zbv", "interleaved_zero_bubble",
         "dualpipev")  # fmt: skip


def shape_of(name: str, devices: int, microbatches: int) -> PipelineShape:
    kind = schedule_kind(name)
    depth = devices * kind.stages_per_device[0]
    places = kind.place(depth, devices)
    return PipelineShape.of(depth, microbatches, places, spread=range(depth - devices, depth))


def test_the_last_stage_runs_one_more_forward_before_it_goes_back() -> None:
    made = schedule_kind("1f1b").make_rows(PipelineShape.of(2, 4))
    assert one_forward_ahead(made).to_csv() == (
        "0F0,0F1,0F2,0B0,0F3,0B1,0B2,0B3\n1F0,1F1,1B0,1F2,1B1,1F3,1B2,1B3\n"
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("devices", [1, 2, 4])
@pytest.mark.parametrize("microbatches", [1, 2, 4, 8])
def test_rows_run_and_keep_one_microbatch_more(name: str, devices: int, microbatches: int) -> None:
    kind, shape = schedule_kind(name), shape_of(name, devices, microbatches)
    if kind.problem(shape):
        pytest.skip("the schedule cannot run so")
    rows = kind.rows(shape)
    assert rows.total_order()  # it does not deadlock
    assert kind.in_flight(shape) == rows.peaks_in_flight
    plain = kind.in_flight(PipelineShape.of(shape.num_stages, microbatches, shape.devices))
    assert all(
        0 <= more - less <= 1 for less, more in zip(plain, kind.in_flight(shape), strict=True)
    )


@pytest.mark.parametrize("name", NAMES)
def test_no_path_is_longer_than_the_step(name: str) -> None:
    kind, shape = schedule_kind(name), shape_of(name, 4, 16)
    prices = [
        StagePrice(1.0 + stage % 3, 2.0 + stage % 2, 0.0, 0.0, weights_s=1.0,
                   softmax_s=0.5 * (stage in shape.spread), rows_s=0.25 * (stage in shape.spread))
        for stage in range(shape.num_stages)
    ]  # fmt: skip
    longest = max(path.seconds(prices) for path in critical_paths(kind, shape))
    step_s = step_seconds(kind, shape, prices)
    assert 0.4 * step_s < longest <= step_s


def test_equal_stages_lose_hardly_more_than_without_a_vocabulary() -> None:
    kind = schedule_kind("1f1b")
    steps = []
    for count in (16, 32, 64):
        shape = shape_of("1f1b", 4, count)
        prices = [StagePrice(1.0, 2.0, 0.0, 0.0, softmax_s=0.2, rows_s=0.1)] * 4
        steps.append(step_seconds(kind, shape, prices) / 3.3 - count)
    assert steps[0] == pytest.approx(steps[1], abs=1e-6)
    assert all(one == pytest.approx(other, abs=1e-6) for one, other in pairwise(steps))
    assert steps[0] < 4  # intervals of fill and flush; without a vocabulary 3
