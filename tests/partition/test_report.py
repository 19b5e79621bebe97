"""What a partition says about its limits."""

from __future__ import annotations

from ipu_pipeline.cost.model import BlockChoice, BlockCost, GraphCosts
from ipu_pipeline.ir.graph import Block, BlockGraph, TensorSpec
from ipu_pipeline.ir.machine import Device, Link, Machine
from ipu_pipeline.partition import Constraints, solve


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
