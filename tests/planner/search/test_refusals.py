"""Every refusal of the package, by its message."""

from __future__ import annotations

import dataclasses

import pytest

from ipu_pipeline.errors import PartitionError
from ipu_pipeline.ir.graph import BlockGraph
from ipu_pipeline.planner.options.block_cost import GraphCosts
from ipu_pipeline.planner.search import Constraints, solve
from tests.planner.search.partition_oracle import make_graph, make_machine, unit_costs

CHAIN = make_graph(5, [(i, i + 1) for i in range(4)], params=[("tied", (0, 4))])
COSTS = unit_costs(CHAIN, weights=100, stash=10)
HALVES = [["b0", "b1"], ["b2", "b3", "b4"]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "zigzag"}, "schedule 'zigzag' is unknown; use one of 1f1b, gpipe"),
        ({"tied": "twice"}, "unknown tied policy 'twice'"),
        ({"recompute": "maybe"}, "or a tuple of block names, got 'maybe'"),
        ({"serialize": {"b0": -1}}, "slices of b0 must be at least 0, got -1"),
        ({"num_stages": 0}, "num_stages must be at least 1, got 0"),
        ({"num_microbatches": 0}, "num_microbatches must be at least 1"),
        ({"replicas": 0}, "replicas must be at least 1"),
        ({"time_limit_s": 0.0}, "time_limit_s must be above 0"),
        ({"stage_devices": (0, 1), "num_stages": 3}, "stage_devices gives 2 stages, num_stages"),
    ],
)
def test_wrong_constraints(options, message):
    with pytest.raises(ValueError, match=message):
        Constraints(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pinned_stages": {"nowhere": 0}}, "pinned_stages names nowhere, which the graph"),
        ({"pinned_devices": {"x": 0}}, "pinned_devices names x"),
        ({"forbidden_cuts": ("x",)}, "forbidden_cuts names x"),
        ({"same_device": (("x", "b0"),)}, "same_device names x"),
        ({"update_s": {"x": 1.0}}, "update_s names x"),
        ({"recompute": ("b1", "b9")}, "recompute names b9, which the graph does not have; its b"),
        ({"serialize": {"x.*": 2}}, r"serialize names x\.\*, which the graph does not have"),
        ({"serialize": {"b1": 3}}, "block 'b1' in 3 slices: only a lookup table or an output proj"),
        ({"num_stages": 6}, "6 stages need at least as many blocks, the graph has 5"),
        ({"num_stages": 3}, "3 stages x 1 replica need 3 devices, the machine offers 2"),
        ({"replicas": 3}, "1 stage x 3 replicas need 3 devices, the machine offers 2"),
        ({"stage_devices": (0, 2)}, r"stage_devices \[0, 2\] must name devices 0 to 1"),
        (
            {"schedule": "popart", "num_stages": 2, "num_microbatches": 2},
            "needs at least 3 microbatches per step, got 2; raise gradient",
        ),
        ({"layers_per_ipu": (1, 1, 3)}, "no pipeline to try: stages any"),
        (
            {"num_stages": 2, "pinned_stages": {"b0": 1}},
            "no split satisfies the constraints, whatever the memory; drop pinned_stages",
        ),
        (
            {"pinned_stages": {"b0": 1}, "pinned_devices": {"b4": 0}, "num_stages": 2},
            "contradict one another",
        ),
    ],
)
def test_solve_refuses(options, message):
    with pytest.raises(PartitionError, match=message):
        solve(CHAIN, COSTS, make_machine(2), Constraints(**options))


def test_a_given_split_that_no_pipeline_can_have_is_refused():
    given = Constraints().with_stages([["b1"], ["b0", "b2", "b3", "b4"]])
    with pytest.raises(PartitionError, match="no split satisfies the constraints"):
        solve(CHAIN, COSTS, make_machine(2), given)
    with pytest.raises(PartitionError, match="pinned_stages names zz, which the graph does not"):
        solve(CHAIN, COSTS, make_machine(2), Constraints().with_stages([["zz"], ["b0"]]))


def test_a_given_split_that_overflows_names_the_stage():
    machine, given = make_machine(2, memory=390), Constraints().with_stages(HALVES)
    with pytest.raises(PartitionError, match=r"stage 1 \(b2 to b4\) needs 0\.000394 MB"):
        solve(CHAIN, COSTS, machine, given)


def test_a_block_without_cost_is_named():
    with pytest.raises(PartitionError, match="no cost for b0, b1, b2, b3, b4"):
        solve(CHAIN, GraphCosts({}, "none"), make_machine(2), Constraints())


def test_an_empty_graph_is_refused():
    with pytest.raises(PartitionError, match="the graph has no block to place"):
        solve(BlockGraph("None", ()), GraphCosts({}, "none"), make_machine(2), Constraints())


def test_blocks_out_of_execution_order_are_refused():
    graph = dataclasses.replace(CHAIN, blocks=CHAIN.blocks[::-1])
    with pytest.raises(PartitionError, match="'t0' goes from 'b0' to 'b1', which runs earlier"):
        solve(graph, COSTS, make_machine(2), Constraints())
