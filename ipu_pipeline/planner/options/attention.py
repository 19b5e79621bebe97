"""Which attention a device runs fused: all of it, or what was measured on it.

A described device (no measured rates) is taken to have a kernel for every attention. A measured
one runs fused what it has a rate for; the rest (a CPU's attention with a learned bias) runs as the
operations of :mod:`ipu_pipeline.ir.attention`, which keep L x S tensors.
"""

from __future__ import annotations

from dataclasses import replace

from ipu_pipeline.ir.attention import is_attention, unfused, unfused_saved_bytes, weights_bytes
from ipu_pipeline.ir.graph import Block, BlockGraph, OpRecord
from ipu_pipeline.ir.machine import Device

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
