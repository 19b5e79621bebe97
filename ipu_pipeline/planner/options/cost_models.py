"""The cost model: a roofline over counted operations for any machine, or measured seconds.

Measuring needs torch and lives in ``backends/local/measure``; here the numbers become prices.

A described device (no measured rates) is taken to have a kernel for every attention. A measured
one runs fused what it has a rate for; the rest (a CPU's attention with a learned bias) runs as the
operations of :mod:`ipu_pipeline.ir.attention`, which keep L x S tensors.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from ipu_pipeline.ir.attention import is_attention, unfused, unfused_saved_bytes, weights_bytes
from ipu_pipeline.ir.graph import Block, BlockGraph, OpRecord
from ipu_pipeline.ir.machine import Device, Machine
from ipu_pipeline.planner.options.block_cost import (
    BlockCost,
    GraphCosts,
    gradient_bytes,
    weight_bytes,
)
from ipu_pipeline.planner.options.block_options import BlockOptions
from ipu_pipeline.planner.options.roofline import Roofline


def estimate(
    graph: BlockGraph,
    machine: Machine,
    *,
    measured_s: Mapping[str, tuple[float, float]] = MappingProxyType({}),
    factors: Mapping[str, Sequence[int]] = MappingProxyType({}),
    unfused: Collection[str] = (),
    loss_in_flight: int | None = None,
) -> GraphCosts:
    """Return the price of every block on the machine's first device.

    Args:
        graph: The model.
        machine: Where it runs.
        measured_s: Measured forward and backward seconds of one microbatch, without
            recomputation, by block; empty: they are computed from counted operations and bytes.
        factors: More numbers of slices to offer, by block; what slicing adds is always computed
            from the machine's peaks (``block_options.py``).
        unfused: Projections that are in another stage than the loss.
        loss_in_flight: Microbatches in flight in the last stage; ``None`` when not known.

    Raises:
        ValueError: Some blocks were measured and this one was not.
    """
    missing = [b.name for b in graph.blocks if b.name not in measured_s] if measured_s else []
    if missing:
        raise ValueError(
            f"no measurement for {', '.join(missing)}; profile the model again on this machine"
        )
    graph, roofline = as_run_on(graph, machine.devices[0]), Roofline(machine.devices[0])
    seconds = measured_s or {block.name: _seconds(graph, block, roofline) for block in graph.blocks}
    options = BlockOptions(graph, roofline, seconds, factors, unfused, loss_in_flight)
    menus, together = options.all()
    blocks = {
        block.name: BlockCost(menus[block.name], weight_bytes(graph, block))
        for block in graph.blocks
    }
    source = "profiled" if measured_s else "analytic"
    return GraphCosts(blocks, source, device_speeds(machine), together, frees_in_order=True)


def _seconds(graph: BlockGraph, block: Block, roofline: Roofline) -> tuple[float, float]:
    adding_s = roofline.accumulation_s(gradient_bytes(graph, block))
    return (
        roofline.seconds(block.forward_ops),
        roofline.seconds(block.backward_ops) + adding_s,
    )


def device_speeds(machine: Machine) -> tuple[float, ...]:
    """Return every device's speed relative to the first, by its float32 peak."""
    first = machine.devices[0].peak_flops_per_s("float32")
    return tuple(device.peak_flops_per_s("float32") / first for device in machine.devices)


# Alive at one time in the backward pass besides what is saved: gradients of the weights behind
# and before the softmax.
_GRADIENTS = 2
_Operations = tuple[OpRecord, ...]


def as_run_on(graph: BlockGraph, device: Device) -> BlockGraph:
    """Return ``graph`` with every attention that ``device`` has no kernel for in its parts."""
    if not device.op_rates:
        return graph
    known: dict[tuple[int, int], tuple[_Operations, _Operations]] = {}
    return replace(graph, blocks=tuple(_as_run(block, device, known) for block in graph.blocks))


def _as_run(
    block: Block, device: Device, known: dict[tuple[int, int], tuple[_Operations, _Operations]]
) -> Block:
    slow = [
        op for op in block.forward_ops
        if is_attention(op) and op.name.split(".")[-1] not in device.op_rates
    ]  # fmt: skip
    if not slow:
        return block
    key = (id(block.forward_ops), id(block.backward_ops))  # equal layers share theirs
    if key not in known:
        names = {name for op in slow for name in (op.name, f"{op.name}_backward")}
        known[key] = _parted(block.forward_ops, names), _parted(block.backward_ops, names)
    forward, backward = known[key]
    gradients = _GRADIENTS * max(weights_bytes(op) for op in slow) if backward else 0
    return replace(
        block,
        forward_ops=forward,
        backward_ops=backward,
        saved_bytes=block.saved_bytes + (unfused_saved_bytes(slow) if backward else 0),
        workspace_bytes=max(block.workspace_bytes, gradients),
    )


def _parted(operations: _Operations, names: set[str]) -> _Operations:
    return tuple(
        part
        for op in operations
        for part in (unfused((op,)) if op.name in names else (op,))
    )  # fmt: skip
