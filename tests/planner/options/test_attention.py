"""Attention is priced as one operation where the device has a kernel for it."""

from __future__ import annotations

from dataclasses import replace

from ipu_pipeline.capture import capture
from ipu_pipeline.ir.attention import ATTENTION, is_attention
from ipu_pipeline.ir.graph import Block, BlockGraph
from ipu_pipeline.ir.machine import Device
from ipu_pipeline.planner.options.cost_models import as_run_on
from tests.tiny_models import TINY

DEVICE = Device("d", 10**9, {"float32": 1e9}, 1e9)
MEASURED = replace(DEVICE, op_rates={ATTENTION: 1e6, f"{ATTENTION}_backward": 1e6})


def graph_of(name: str) -> BlockGraph:
    return capture(*TINY[name].build(), self_check=False).graph


def layers(graph: BlockGraph) -> list[Block]:
    return [block for block in graph.blocks if block.kind == "layer"]


def test_a_described_device_has_a_kernel_for_all_attention() -> None:
    graph = graph_of("t5")
    assert as_run_on(graph, DEVICE) is graph


def test_a_measured_device_runs_what_it_has_no_rate_for_in_parts() -> None:
    assert as_run_on(graph_of("llama"), MEASURED) == graph_of("llama")
    graph = graph_of("t5")  # a learned bias
    for before, after in zip(layers(graph), layers(as_run_on(graph, MEASURED)), strict=True):
        assert any(is_attention(op) and "_bias" in op.name for op in before.forward_ops)
        assert not any("_bias" in op.name for op in (*after.forward_ops, *after.backward_ops))
        assert after.forward_flops == before.forward_flops
        assert after.saved_bytes > before.saved_bytes
