"""Schedules with several stages per device: the search places and splits for them."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest

from ipu_pipeline.errors import PartitionError
from ipu_pipeline.planner.schedules import (
    PipelineShape,
    StagePrice,
    schedule_kind,
    schedule_names,
    step_seconds,
)
from ipu_pipeline.planner.search import Constraints, solve
from tests.planner.search.partition_oracle import make_graph, make_machine, unit_costs

SECONDS = [0.5, 2, 2, 2, 2, 2, 2, 2, 0.3, 1.7]
LOOPED = [name for name in schedule_names() if not schedule_kind(name).any_devices]


def chain(seconds, **more):
    count = len(seconds)
    graph = make_graph(count, [(i, i + 1) for i in range(count - 1)], sizes=[0] * count,
                       params=[], inputs=[], training=True)  # fmt: skip
    return graph, unit_costs(graph, seconds, **more)


@pytest.mark.parametrize("schedule", LOOPED)
def test_splits_for_the_devices_of_the_schedule(schedule: str) -> None:
    graph, costs = chain(SECONDS)
    machine = make_machine(2)
    found = solve(graph, costs, machine, Constraints(num_stages=4, num_microbatches=4,
                                                     schedule=schedule))  # fmt: skip
    kind = schedule_kind(schedule)
    assert found.devices == kind.place(4, 2)
    shape = PipelineShape.of(4, 4, found.devices)
    assert tuple(stage.in_flight for stage in found.stages) == kind.in_flight(shape)
    least = float("inf")
    for cuts in combinations(range(1, len(SECONDS)), 3):  # every split in execution order
        edges = [0, *cuts, len(SECONDS)]
        loads = [sum(SECONDS[a:b]) for a, b in pairwise(edges)]
        times = [StagePrice.split(load, 2 * load) for load in loads]
        least = min(least, step_seconds(kind, shape, times))
    assert found.objective == pytest.approx(least)
    assert found.lower_bound <= least * (1 + 1e-12)


@pytest.mark.parametrize("schedule", LOOPED)
def test_finds_the_depth_itself(schedule: str) -> None:
    graph, costs = chain(SECONDS)
    found = solve(graph, costs, make_machine(3), Constraints(num_microbatches=6, schedule=schedule))
    kind, used = schedule_kind(schedule), len(set(found.devices))
    assert found.devices == kind.place(len(found.stages), used)
    assert len(found.stages) // used in kind.stages_per_device


def test_many_blocks_are_as_good_as_equal_stages() -> None:
    graph, costs = chain([1.0] * 64)
    limits = Constraints(num_stages=16, num_microbatches=32, schedule="interleaved")
    found = solve(graph, costs, make_machine(8), limits)
    assert found.objective == pytest.approx(32 * 24.0 + 7 * 12.0)


def test_memory_of_all_stages_of_a_device_counts() -> None:
    graph, costs = chain([1.0] * 8, weights=100)
    limits = Constraints(num_stages=4, num_microbatches=4, schedule="zbv")
    assert len(solve(graph, costs, make_machine(2, memory=400), limits).stages) == 4
    with pytest.raises(PartitionError, match="no split fits"):
        solve(graph, costs, make_machine(2, memory=390), limits)


@pytest.mark.parametrize(
    ("schedule", "stages", "microbatches", "message"),
    [
        ("zbv", 3, 4, "runs exactly 2 stages per device, which they visit in a V: 3 stages"),
        ("zbv", 8, 4, "8 stages x 1 replica need 4 devices, the machine offers 2"),
        ("dualpipev", 4, 3, "at least as many microbatches as stages, got 3 microbatches and 4"),
    ],
)
def test_what_cannot_be_planned(schedule, stages, microbatches, message) -> None:
    graph, costs = chain(SECONDS)
    limits = Constraints(num_stages=stages, num_microbatches=microbatches, schedule=schedule)
    with pytest.raises(PartitionError, match=message):
        solve(graph, costs, make_machine(2), limits)


def test_devices_that_the_schedule_does_not_visit_so_are_refused() -> None:
    graph, costs = chain(SECONDS)
    limits = Constraints(stage_devices=(0, 1, 1, 0), num_microbatches=4, schedule="interleaved")
    with pytest.raises(PartitionError, match=r"puts its stages on devices \[0, 1, 0, 1\], got"):
        solve(graph, costs, make_machine(2), limits)
    limits = Constraints(stage_devices=(0, 1, 0, 1), num_microbatches=5, schedule="interleaved")
    with pytest.raises(PartitionError, match="in 2 equal groups of at least 2: 5 microbatches"):
        solve(graph, costs, make_machine(2), limits)
