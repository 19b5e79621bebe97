"""Splits for schedules with several stages per device: none better next to them, in memory."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from ipu_pipeline.planner.options.block_cost import BlockChoice, BlockCost, GraphCosts
from ipu_pipeline.planner.search import Constraints, InfeasibleError, solve
from tests.planner.search.partition_oracle import make_graph, make_machine

SECONDS = (3, 1, 4, 1, 5, 9, 2, 6, 5, 3)
GRAPH = make_graph(10, [(i, i + 1) for i in range(9)], sizes=[1] * 10)
RUN = Constraints(num_stages=4, num_microbatches=6)


def costs(*, weights=10, stash=100):
    """Plain and recomputed ways; recomputation keeps a tenth."""
    return GraphCosts(
        {
            f"b{i}": BlockCost(
                (
                    BlockChoice(seconds, 2 * seconds, stash, 5),
                    BlockChoice(seconds, 3 * seconds, stash // 10, 50, recompute=True),
                ),
                {f"w{i}": weights},
            )
            for i, seconds in enumerate(SECONDS)
        },
        "made up",
    )


def device_bytes(found):
    held = {}
    for stage in found.stages:
        held[stage.device] = held.get(stage.device, 0) + stage.memory_bytes
    return held


@pytest.mark.parametrize("schedule", ["zbv", "interleaved", "looped_bfs"])
@pytest.mark.parametrize("memory", [10**9, 2500, 1300])
def test_no_boundary_is_better_one_block_away(schedule, memory):
    machine, run = make_machine(2, memory=memory), replace(RUN, schedule=schedule)
    found = solve(GRAPH, costs(), machine, run)
    assert max(device_bytes(found).values()) <= memory
    names = [name for stage in found.blocks for name in stage]
    ends = [names.index(stage[0]) for stage in found.blocks[1:]]
    for place, end in enumerate(ends):
        for moved in (end - 1, end + 1):
            edges = [0, *ends[:place], moved, *ends[place + 1 :], len(names)]
            if sorted(set(edges)) != edges:
                continue
            stages = [names[a:b] for a, b in pairwise(edges)]
            try:
                other = solve(GRAPH, costs(), machine, run.with_stages(stages))
            except InfeasibleError:
                continue
            assert other.objective >= found.objective * (1 - 1e-9)


def test_blocks_of_one_device_are_recomputed_together():
    ample = solve(GRAPH, costs(), make_machine(2), replace(RUN, schedule="zbv"))
    assert not any(stage.recompute for stage in ample.stages)
    tight = solve(GRAPH, costs(), make_machine(2, memory=900), replace(RUN, schedule="zbv"))
    chosen = [name for stage in tight.stages for name in stage.recompute]
    assert 0 < len(chosen) < len(GRAPH.blocks)
    assert tight.objective > ample.objective


def test_a_split_is_found_where_equal_stages_do_not_fit():
    heavy = costs()
    blocks = {**heavy.blocks, "b0": replace(heavy.blocks["b0"], weight_bytes={"w0": 1500})}
    machine = make_machine(2, memory=[2400, 1800])
    found = solve(GRAPH, replace(heavy, blocks=blocks), machine, replace(RUN, schedule="zbv"))
    assert device_bytes(found)[0] <= 2400
    assert device_bytes(found)[1] <= 1800


def test_too_small_devices_are_refused_with_what_helps():
    with pytest.raises(InfeasibleError, match=r"it fits if you .*give every device") as caught:
        solve(GRAPH, costs(), make_machine(2, memory=250), replace(RUN, schedule="zbv"))
    for change in caught.value.changes:
        assert solve(GRAPH, change.costs, change.machine, change.constraints).stages


def test_groups_of_one_device_are_kept_together():
    run = replace(RUN, schedule="zbv", same_device=(("b0", "b9"),))
    found = solve(GRAPH, costs(), make_machine(2), run)
    device = {name: stage.device for stage in found.stages for name in stage.blocks}
    assert device["b0"] == device["b9"]
    apart = replace(RUN, schedule="looped_bfs", same_device=(("b0", "b9"),))
    found = solve(GRAPH, costs(), make_machine(2), replace(apart, num_stages=None))
    device = {name: stage.device for stage in found.stages for name in stage.blocks}
    assert device["b0"] == device["b9"]
