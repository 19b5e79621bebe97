"""The analytic cost model: a roofline over counted operations, for any machine description.

An operation takes the longer of ``flops / peak`` and ``bytes moved / memory bandwidth``.

Source: Williams, Waterman, Patterson, Roofline, CACM 2009.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from ipu_pipeline.cost.memory import OptimizerMemory, weight_bytes
from ipu_pipeline.cost.model import BlockChoice, BlockCost, GraphCosts
from ipu_pipeline.ir.graph import Block, BlockGraph, OpRecord
from ipu_pipeline.ir.machine import Device, Machine


@dataclass(frozen=True)
class AnalyticCostModel:
    """Prices blocks from FLOPs and bytes moved.

    Attributes:
        dtype: Compute dtype whose peak is used; ``None`` takes each operation's own.
        memory: What a trainable parameter costs in bytes besides its weight.
    """

    dtype: str | None = None
    memory: OptimizerMemory = field(default_factory=OptimizerMemory)

    def estimate(self, graph: BlockGraph, machine: Machine) -> GraphCosts:
        """Return the price of every block on the machine's first device."""
        device = machine.devices[0]
        blocks = {block.name: self._block(graph, block, device) for block in graph.blocks}
        return GraphCosts(blocks, "analytic", device_speeds(machine))

    def _block(self, graph: BlockGraph, block: Block, device: Device) -> BlockCost:
        forward = self._seconds(block.forward_ops, device)
        backward = self._seconds(block.backward_ops, device)
        weights = weight_bytes(graph, block, self.memory)
        return BlockCost(block_choices(graph, block, forward, backward), weights)

    def _seconds(self, operations: Iterable[OpRecord], device: Device) -> float:
        return sum(
            op.count
            * max(
                op.flops / device.peak_flops_per_s(self.dtype or op.dtype),
                op.bytes_moved / device.memory_bytes_per_s,
            )
            for op in operations
        )


def block_choices(
    graph: BlockGraph, block: Block, forward_s: float, backward_s: float
) -> tuple[BlockChoice, ...]:
    """Return the ways to run ``block``: plain, and with its forward pass recomputed.

    Recomputation keeps only what enters the block and needs the saved tensors again as
    workspace while the block runs backward.
    """
    plain = BlockChoice(forward_s, backward_s, block.saved_bytes, block.workspace_bytes)
    if not graph.training or block.saved_bytes == 0:
        return (plain,)
    recomputed = BlockChoice(
        forward_s=forward_s,
        backward_s=backward_s + forward_s,
        stash_bytes=sum(graph.tensor_by_name[name].num_bytes for name in block.inputs),
        workspace_bytes=block.workspace_bytes + block.saved_bytes,
        recompute=True,
    )
    return (plain, recomputed) if recomputed.stash_bytes < plain.stash_bytes else (plain,)


def device_speeds(machine: Machine) -> tuple[float, ...]:
    """Return every device's speed relative to the first, by its float32 peak."""
    first = machine.devices[0].peak_flops_per_s("float32")
    return tuple(device.peak_flops_per_s("float32") / first for device in machine.devices)
