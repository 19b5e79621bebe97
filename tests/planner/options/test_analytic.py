"""The roofline, by hand: the machine does 1e9 FLOP/s (float16: 4e9) and moves 1e8 bytes/s."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ipu_pipeline.ir.graph import OpRecord
from ipu_pipeline.ir.machine import Device
from ipu_pipeline.planner.options.block_cost import GraphCosts, weight_bytes
from ipu_pipeline.planner.options.block_options import block_choices
from ipu_pipeline.planner.options.cost_models import (
    device_speeds,
    estimate,
)
from tests.ir.plan_example import example_graph, example_machine


def priced(*operations: OpRecord) -> float:
    graph = example_graph()
    block = replace(graph.blocks[1], forward_ops=operations)
    graph = replace(graph, blocks=(graph.blocks[0], block, *graph.blocks[2:]))
    costs = estimate(graph, example_machine())
    return costs.blocks["layer.0"].plain.forward_s


def test_compute_bound_operation_takes_flops_over_peak() -> None:
    op = OpRecord("aten.mm", "matmul", "float32", (), flops=2_000_000, bytes_moved=100, count=3)
    assert priced(op) == pytest.approx(3 * 2_000_000 / 1e9)


def test_memory_bound_operation_takes_bytes_over_bandwidth() -> None:
    op = OpRecord("aten.add", "vector", "float32", (), flops=10, bytes_moved=1_000_000)
    assert priced(op) == pytest.approx(1_000_000 / 1e8)


def test_every_operation_takes_its_own_bound() -> None:
    compute = OpRecord("aten.mm", "matmul", "float32", (), flops=1_000_000, bytes_moved=0)
    memory = OpRecord("aten.add", "vector", "float32", (), flops=0, bytes_moved=100_000)
    assert priced(compute, memory) == pytest.approx(0.001 + 0.001)


def test_dtype_of_the_operation_counts() -> None:
    half = OpRecord("aten.mm", "matmul", "float16", (), flops=4_000_000, bytes_moved=0)
    full = replace(half, dtype="float32")
    assert priced(half) == pytest.approx(0.001)
    assert priced(full) == pytest.approx(0.004)


def test_backward_is_priced_from_its_own_operations() -> None:
    costs = estimate(example_graph(), example_machine())
    plain = costs.blocks["layer.0"].plain  # 2 and 4 times max(512/1e9, 384/1e8)
    assert plain.forward_s == pytest.approx(2 * 3.84e-6)
    assert plain.backward_s == pytest.approx(4 * 3.84e-6)
    assert plain.total_s == pytest.approx(6 * 3.84e-6)
    assert costs.source == "analytic"


def test_recompute_keeps_the_input_and_runs_forward_again() -> None:
    graph = example_graph()
    plain, again = block_choices(graph, graph["layer.0"], 1.0, 2.0)
    assert (plain.stash_bytes, plain.workspace_bytes, plain.recompute) == (4096, 128, False)
    assert (again.forward_s, again.backward_s) == (1.0, 3.0)
    assert again.stash_bytes == 4 * 8 * 4  # tensor e
    assert again.workspace_bytes == 128 + 4096
    assert again.recompute


def test_no_recompute_where_it_saves_nothing() -> None:
    graph = example_graph()
    layer = graph["layer.0"]
    assert len(block_choices(graph, replace(layer, saved_bytes=0), 1.0, 2.0)) == 1
    assert len(block_choices(graph, replace(layer, saved_bytes=128), 1.0, 2.0)) == 1
    assert len(block_choices(graph, replace(layer, saved_bytes=129), 1.0, 2.0)) == 2
    assert len(block_choices(example_graph(training=False), layer, 1.0, 0.0)) == 1


def test_memory_of_a_parameter() -> None:
    graph = example_graph()
    assert weight_bytes(graph, graph["embed"]) == {"embed.weight": 80 * (4 + 4 + 8)}
    assert weight_bytes(graph, graph["layer.0"]) == {"layer.0.weight": 64 * 4}  # frozen
    assert weight_bytes(graph, graph["layer.1"]) == {"layer.1.weight": 64 * (2 + 2 + 8)}
    inference = example_graph(training=False)
    assert weight_bytes(inference, inference["embed"]) == {"embed.weight": 320}


def test_tied_parameter_has_one_name_in_both_blocks() -> None:
    costs = estimate(example_graph(), example_machine())
    together = {**costs.blocks["embed"].weight_bytes, **costs.blocks["head"].weight_bytes}
    assert together == {"embed.weight": 1280}


def test_speeds_are_relative_to_the_first_device() -> None:
    machine = example_machine(2)
    fast = Device("fast", 10**9, {"float32": 3e9}, 1e8)
    mixed = replace(machine, devices=(machine.devices[0], fast))
    assert device_speeds(mixed) == (1.0, 3.0)
    costs = GraphCosts({}, "analytic", (1.0, 3.0))
    assert [costs.speed(device) for device in range(3)] == [1.0, 3.0, 1.0]


def test_profiled_times_become_prices() -> None:
    graph = example_graph()
    times = {block.name: (0.25, 0.5) for block in graph.blocks}
    costs = estimate(graph, example_machine(), measured_s=times)
    plain, again = costs.blocks["layer.0"].choices
    assert (plain.forward_s, plain.backward_s, again.backward_s) == (0.25, 0.5, 0.75)
    assert costs.blocks["embed"].weight_bytes == {"embed.weight": 1280}
    assert costs.source == "profiled"


def test_block_without_measurement_is_refused_by_name() -> None:
    times = {"embed": (1.0, 1.0), "head": (1.0, 1.0)}
    with pytest.raises(ValueError, match=r"no measurement for layer\.0, layer\.1; profile"):
        estimate(example_graph(), example_machine(), measured_s=times)
