"""The bound that a plan reports: below the replay of every split, and tight where it can be."""

from __future__ import annotations

import random
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipu_pipeline.errors import PartitionError
from ipu_pipeline.planner.schedules import (
    PipelineShape,
    StagePrice,
    schedule_kind,
    schedule_names,
    step_seconds,
)
from ipu_pipeline.planner.search import Constraints, solve
from ipu_pipeline.planner.search.step_bound import least_fullest
from tests.planner.search.partition_oracle import (
    all_splits,
    make_graph,
    make_machine,
    transfers,
    unit_costs,
)


def case(seed):
    rng = random.Random(seed)
    count = rng.randint(3, 7)
    edges = [(i, i + 1) for i in range(count - 1)]
    edges += [(p, c) for c in range(count) for p in range(c - 1) if rng.random() < 0.2]
    if rng.random() < 0.4:  # two branches: more than one order
        edges = [(p, c) for p, c in edges if (p, c) != (0, 1)]
    graph = make_graph(count, edges, sizes=[rng.randint(1, 20) for _ in range(count)])
    seconds = [rng.randint(1, 6) for _ in range(count)]
    machine = make_machine(rng.randint(1, 3), bandwidth=rng.choice([40.0, 1e9]))
    return graph, seconds, machine


def replay_s(graph, seconds, machine, schedule, microbatches, stages, devices):
    kind = schedule_kind(schedule)
    shape = PipelineShape.of(len(stages), microbatches, devices)
    of = dict(zip(graph.block_index, seconds, strict=True))
    send_f, send_b, _ = transfers(graph, machine, stages, devices)
    times = [
        StagePrice.split(work + send_f[s], 2 * work, send_b[s])
        for s, work in enumerate(sum(of[name] for name in stage) for stage in stages)
    ]
    return step_seconds(kind, shape, times)


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6), bins=st.integers(1, 3))
def test_the_fullest_bin_is_never_below_its_bound(sizes, bins):
    ways = product(range(bins), repeat=len(sizes))
    best = min(max(sum(s for s, b in zip(sizes, way, strict=True) if b == n) for n in range(bins))
               for way in ways)  # fmt: skip
    assert max(sum(sizes) / bins, *sizes, 0) * 0.999999 <= least_fullest(sizes, bins)
    assert least_fullest(sizes, bins) <= best * 1.000001


def test_equal_items_are_not_divided():
    assert least_fullest([1.0] * 78, 13) == pytest.approx(6.0)
    assert least_fullest([1.0] * 79, 13) == pytest.approx(7.0)


@pytest.mark.parametrize("schedule", schedule_names())
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), microbatches=st.sampled_from([1, 2, 3, 4, 6, 8, 12]))
def test_no_replay_is_below_the_bound(schedule, seed, microbatches):
    graph, seconds, machine = case(seed)
    constraints = Constraints(num_microbatches=microbatches, schedule=schedule)

    def step(split):
        return replay_s(
            graph, seconds, machine, schedule, microbatches, split.blocks, split.devices
        )

    try:
        found = solve(graph, unit_costs(graph, seconds), machine, constraints, step=step)
    except PartitionError:
        return  # the schedule cannot run with so few blocks, devices or microbatches
    assert found.objective == pytest.approx(step(found))
    kind = schedule_kind(schedule)
    for count in range(1, len(machine.devices) + 1):
        for depth in {count} if kind.any_devices else {count * n for n in kind.stages_per_device}:
            devices = kind.place(depth, count) if not kind.any_devices else tuple(range(count))
            if devices is None or depth > len(graph.blocks):
                continue
            if kind.problem(PipelineShape.of(depth, microbatches, devices)):
                continue
            for stages in all_splits(graph, depth):
                seconds_of = replay_s(
                    graph, seconds, machine, schedule, microbatches, stages, devices
                )
                assert found.lower_bound <= seconds_of * (1 + 1e-9)


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_equal_stages_are_proven_optimal(schedule):
    graph = make_graph(12, [(i, i + 1) for i in range(11)], sizes=[1] * 12)
    machine = make_machine(4, bandwidth=1e12)
    constraints = Constraints(num_stages=4, num_microbatches=8, schedule=schedule)
    found = solve(graph, unit_costs(graph), machine, constraints, step=lambda split: replay_s(
        graph, [1] * 12, machine, schedule, 8, split.blocks, split.devices))  # fmt: skip
    assert found.gap < 1e-9
