"""Attention with dropout is one operation where our kernels run it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ipu_pipeline.capture import capture
from ipu_pipeline.ir.graph import Block, BlockGraph
from ipu_pipeline.ir.machine import Device, Link, Machine
from ipu_pipeline.planner.options.attention import BACKWARD, FORWARD, as_one_operation
from ipu_pipeline.planner.options.cost_models import AnalyticCostModel
from tests.tiny_models import TINY

DEVICE = Device("d", 10**9, {"float32": 1e9}, 1e9)


def layer_of(name: str, kind: str = "layer") -> tuple[BlockGraph, Block]:
    model, batch = TINY[name].build(dropout=True)
    graph = capture(model, batch).graph
    return graph, next(block for block in graph.blocks if block.kind == kind)


def names(operations: tuple) -> list[str]:
    return [op.name for op in operations]


def test_its_products_become_one_operation_of_as_many_flops() -> None:
    _, block = layer_of("bert-qa")
    forward, backward = as_one_operation(block)
    assert "aten._safe_softmax" in names(block.forward_ops)
    assert not {"aten._safe_softmax", "aten.bmm"} & set(names(forward))
    assert not {"aten._softmax_backward_data", "aten.bmm"} & set(names(backward))
    for before, after in ((block.forward_ops, forward), (block.backward_ops, backward)):
        assert sum(op.flops * op.count for op in before) == sum(op.flops * op.count for op in after)
    whole = next(op for op in forward if op.name == f"ipu_pipeline.{FORWARD}")
    assert whole.shapes == ((2, 4, 16, 16),)
    assert whole.flops == 2 * 2 * (2 * 4 * 16 * 16 * 8)
    assert whole.bytes_moved == 2 * 2 * 4 * (2 * 4 * 16 * 8)  # q, k; v, result
    assert f"ipu_pipeline.{BACKWARD}" in names(backward)


def test_other_operations_stay() -> None:
    _, block = layer_of("bert-qa")
    forward, _ = as_one_operation(block)
    assert names(forward).count("aten.addmm") == names(block.forward_ops).count("aten.addmm")
    assert "aten.native_layer_norm" in names(forward)


@pytest.mark.parametrize("name", ["t5", "vit", "llama"])
def test_a_learned_bias_or_no_dropout_leaves_it_as_it_is(name: str) -> None:
    _, block = layer_of(name)
    assert as_one_operation(block) == (block.forward_ops, block.backward_ops)


def test_a_machine_without_its_rate_is_priced_by_the_parts() -> None:
    graph, block = layer_of("bert-qa")

    def price(device: Device) -> float:
        machine = Machine("m", (device,), Link(1e9))
        return AnalyticCostModel().estimate(graph, machine).blocks[block.name].plain.total_s

    slow = replace(DEVICE, op_rates={FORWARD: 1e3, BACKWARD: 1e3})
    assert price(slow) > 10 * price(DEVICE)
    assert price(replace(DEVICE, op_rates={BACKWARD: 1e3})) == price(DEVICE)
