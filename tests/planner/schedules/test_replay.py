"""The exact step time: equal to a naive simulation, above its proven bounds, quick for many."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipu_pipeline.ir.schedule import requirements
from ipu_pipeline.planner.schedules import (
    PipelineShape,
    StagePrice,
    critical_paths,
    replay,
    schedule_kind,
    schedule_names,
    step_seconds,
)
from ipu_pipeline.planner.schedules.replay import KINDS
from tests.planner.schedules.torch_oracle import shape_for

REPLAYED = [name for name in schedule_names() if not schedule_kind(name).lock_stepped]
seconds = st.floats(0.001, 1.0)


def bound_seconds(kind, shape, times):
    """Return the longest critical path; of lock-stepped schedules the objective."""
    prices = times
    if kind.lock_stepped:
        return kind.objective(shape).seconds(shape.devices, prices)
    return max(path.seconds(prices) for path in critical_paths(kind, shape))


@st.composite
def pipelines(draw, names=REPLAYED, most_microbatches: int = 20, *, spread: bool = False):
    kind = schedule_kind(draw(st.sampled_from(names)))
    numbers = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    shape = shape_for(kind, *numbers, draw(st.integers(1, most_microbatches)))
    if shape is None:
        shape = shape_for(kind, numbers[0], kind.stages_per_device[0], 2 * numbers[0])
    assert shape is not None
    stage = st.builds(StagePrice.split, seconds, seconds, st.floats(0, 0.3))
    times = draw(st.lists(stage, min_size=shape.num_stages, max_size=shape.num_stages))
    if spread and not kind.lock_stepped:
        holders = draw(st.sets(st.integers(0, shape.num_stages - 1), min_size=1))
        shape = replace(shape, spread=tuple(sorted(holders)))
        times = [
            replace(price, softmax_s=draw(seconds), rows_s=draw(seconds)) if n in holders else price
            for n, price in enumerate(times)
        ]
    return kind, shape, times


def naive(kind, shape, times) -> float:
    """Run the rows action by action until nothing is left."""
    rows = [list(row) for row in kind.rows(shape).rows]
    free, ends = [0.0] * len(rows), {}
    while any(rows):
        for index, row in enumerate(rows):
            while row and requirements(row[0], shape.num_stages, shape.spread) <= set(ends):
                action = row.pop(0)
                stage = times[action.stage]
                lasts = dict(zip(KINDS, stage.by_kind, strict=True))[action.kind]
                waits = requirements(action, shape.num_stages, shape.spread)
                needed = [ends[item] for item in waits]
                free[index] = max([free[index], *needed]) + lasts
                ends[action.result] = free[index]
    return max(free)


@settings(max_examples=60, deadline=None)
@given(pipelines(most_microbatches=8))
def test_the_replay_is_the_naive_simulation(case) -> None:
    assert step_seconds(*case) == pytest.approx(naive(*case), rel=1e-12)


@settings(max_examples=60, deadline=None)
@given(pipelines(most_microbatches=8, spread=True))
def test_the_replay_with_a_spread_vocabulary_is_the_naive_simulation(case) -> None:
    assert step_seconds(*case) == pytest.approx(naive(*case), rel=1e-12)


@given(pipelines(spread=True))
def test_no_replay_with_a_spread_vocabulary_is_below_its_paths(case) -> None:
    assert bound_seconds(*case) <= step_seconds(*case) * (1 + 1e-12)


@given(pipelines())
def test_no_replay_is_below_its_bound(case) -> None:
    kind, shape, times = case
    step_s = step_seconds(kind, shape, times)
    assert bound_seconds(kind, shape, times) <= step_s * (1 + 1e-12)
    busiest = max(
        sum(t.load_s for t, d in zip(times, shape.devices, strict=True) if d == device)
        for device in shape.devices
    )
    assert step_s >= shape.num_microbatches * busiest * (1 - 1e-12)


@given(pipelines(["1f1b"]))
def test_the_bound_of_1f1b(case) -> None:
    """The two lengths of every stage, written out."""
    kind, shape, times = case
    loads = [stage.forward_s + stage.backward_s for stage in times]
    count, lengths = shape.num_microbatches, []
    for stage, load in enumerate(loads):
        behind = len(loads) - 1 - stage
        lengths.append(count * load + sum(loads[:stage]))
        if count > behind:
            more = (count - behind - 1) * load + sum(loads[stage + 1 :])
            lengths.append(sum(loads) + more)
    assert bound_seconds(kind, shape, times) >= max(lengths) * (1 - 1e-12)
    assert len(critical_paths(kind, shape)) > len(loads)


@given(pipelines(["gpipe"]))
def test_the_bound_of_gpipe_is_its_time(case) -> None:
    assert bound_seconds(*case) == pytest.approx(step_seconds(*case), rel=1e-12)


@given(st.lists(st.tuples(seconds, seconds), min_size=1, max_size=5), st.integers(0, 9),
       st.lists(st.integers(0, 2), min_size=5, max_size=5))  # fmt: skip
def test_popart_is_its_form_on_any_devices(times, more, devices) -> None:
    kind, depth = schedule_kind("popart"), len(times)
    shape = PipelineShape.of(depth, 2 * depth - 1 + more, devices[:depth])
    stages = [StagePrice.split(*pair) for pair in times]
    assert step_seconds(kind, shape, stages) == bound_seconds(kind, shape, stages)


@settings(max_examples=30, deadline=None)
@given(pipelines([name for name in REPLAYED if name not in ("gpipe", "looped_bfs")]), st.data())
def test_many_microbatches_continue_the_steady_state(case, data) -> None:
    kind, shape, times = case
    count = shape.num_devices * data.draw(st.integers(60, 90))
    shape = PipelineShape.of(shape.num_stages, count, shape.devices)
    whole = step_seconds(kind, shape, times)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay, "_MOST_ACTIONS", 1)
        assert step_seconds(kind, shape, times) == pytest.approx(whole, rel=1e-9)


@pytest.mark.parametrize("name", ["1f1b", "interleaved", "zbv", "popart"])
def test_a_million_microbatches_take_no_time(name: str) -> None:
    kind = schedule_kind(name)
    shape = shape_for(kind, 16, kind.stages_per_device[0], 1 << 20)
    assert shape is not None
    times = [StagePrice.split(0.001 * (1 + stage % 3), 0.002) for stage in range(shape.num_stages)]
    before = time.process_time()
    step_s = step_seconds(kind, shape, times)
    assert time.process_time() - before < 5
    assert step_s >= shape.num_microbatches * 0.005
