"""What a partition says about its limits."""

from __future__ import annotations

from dataclasses import replace

from ipu_pipeline.ir.graph import Block, BlockGraph, TensorSpec
from ipu_pipeline.ir.machine import Device, Link, Machine
from ipu_pipeline.ir.plan import PlannedStage
from ipu_pipeline.planner.options.block_cost import BlockChoice, BlockCost, GraphCosts
from ipu_pipeline.planner.search import Constraints, solve


def chain(num_blocks: int) -> BlockGraph:
    names = [f"b{index}" for index in range(num_blocks)]
    tensors = tuple(
        TensorSpec(f"t{i}", (1,), "float32", True, names[i], (names[i + 1],))
        for i in range(num_blocks - 1)
    )
    blocks = tuple(
        Block(
            name,
            inputs=(f"t{i - 1}",) if i else (),
            outputs=(f"t{i}",) if i < num_blocks - 1 else (),
        )
        for i, name in enumerate(names)
    )
    return BlockGraph("Chain", blocks, tensors)


def bound_by(memory_bytes: int) -> str:
    graph = chain(4)
    choices = (BlockChoice(1.0, 2.0, 100), BlockChoice(1.0, 3.0, 10, recompute=True))
    costs = GraphCosts({block.name: BlockCost(choices, {}) for block in graph.blocks}, "analytic")
    devices = tuple(Device(f"d{i}", memory_bytes, {"float32": 1.0}, 1.0) for i in range(4))
    machine = Machine("four", devices, Link(bytes_per_s=1e12))
    return solve(graph, costs, machine, Constraints(num_stages=4, num_microbatches=8)).binding


def test_time_alone() -> None:
    assert bound_by(10_000).startswith("time: stage ")
    assert "memory" not in bound_by(10_000)


def test_memory_names_the_stages_and_the_fullest() -> None:
    expected = (
        "; memory: stage 0-1 recompute or serialize to fit (fullest: stage 1 with 4.2e-05 of "
        "0.00025 MB)"
    )
    assert bound_by(250).endswith(expected)


def one_stage(*, frees_in_order: bool) -> PlannedStage:
    graph = chain(3)
    ways = (BlockChoice(1.0, 2.0, 100, 500), BlockChoice(1.0, 2.0, 100, 30), BlockChoice(1, 2, 100))
    costs = GraphCosts(
        {b.name: BlockCost((way,), {"w": 7}) for b, way in zip(graph.blocks, ways, strict=True)},
        "test",
        frees_in_order=frees_in_order,
    )
    machine = Machine("one", (Device("d", 10_000, {"float32": 1.0}, 1.0),), Link(1.0))
    return solve(graph, costs, machine, Constraints(num_stages=1, num_microbatches=2)).stages[0]


def test_memory_follows_the_order_of_the_blocks() -> None:
    plain, ordered = one_stage(frees_in_order=False), one_stage(frees_in_order=True)
    assert plain.memory_bytes == 7 + 300 + 500
    assert ordered.memory_bytes == 7 + (100 + 500)  # nothing of the later blocks is there
    for stage in (plain, ordered):
        assert (stage.weight_bytes, stage.stash_bytes) == (7, 300)


def test_what_is_kept_in_a_shared_memory_enters_no_stage_twice() -> None:
    held = {}
    for kept in (False, True):
        graph = chain(2)
        tensor = replace(graph.tensors[0], kept=kept)
        graph = replace(graph, tensors=(tensor,))
        costs = GraphCosts({b.name: BlockCost((BlockChoice(1, 1),), {}) for b in graph.blocks}, "t")
        devices = tuple(Device(f"d{i}", 1000, {"float32": 1.0}, 1.0) for i in range(2))
        machine = Machine("two", devices, Link(1.0), shared_memory=True)
        found = solve(graph, costs, machine, Constraints(num_stages=2, num_microbatches=4))
        held[kept] = [stage.memory_bytes for stage in found.stages]
    assert held == {False: [0, 4], True: [0, 0]}
