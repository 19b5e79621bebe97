"""The analytic cost model: a roofline over counted operations, for any machine description.

The profiled cost model: measured seconds where a block ran on this machine.

Measuring needs torch and lives in ``profiling/blocks.py``; here measured numbers become prices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ipu_pipeline.ir.graph import Block, BlockGraph
from ipu_pipeline.ir.machine import Machine
from ipu_pipeline.planner.options.attention import as_run_on
from ipu_pipeline.planner.options.block_cost import (
    BlockCost,
    GraphCosts,
    OptimizerMemory,
    gradient_bytes,
    weight_bytes,
)
from ipu_pipeline.planner.options.block_options import BlockOptions
from ipu_pipeline.planner.options.roofline import Roofline


@dataclass(frozen=True)
class AnalyticCostModel:
    """Prices blocks from FLOPs and bytes moved.

    Attributes:
        dtype: Compute dtype whose peak is used; ``None`` takes each operation's own.
        memory: What a trainable parameter costs in bytes besides its weight.
        factors: More numbers of slices to offer, by block (``menus.py``).
        unfused: Projections that are in another stage than the loss.
        loss_in_flight: Microbatches in flight in the last stage; ``None`` when not known.
    """

    dtype: str | None = None
    memory: OptimizerMemory = field(default_factory=OptimizerMemory)
    factors: Mapping[str, Sequence[int]] = field(default_factory=dict, hash=False)
    unfused: tuple[str, ...] = ()
    loss_in_flight: int | None = None

    def estimate(self, graph: BlockGraph, machine: Machine) -> GraphCosts:
        """Return the price of every block on the machine's first device."""
        graph = as_run_on(graph, machine.devices[0])
        roofline = Roofline(machine.devices[0], self.dtype)
        seconds = {block.name: _seconds(graph, block, roofline) for block in graph.blocks}
        menu = BlockOptions(graph, roofline, self.factors, self.unfused, self.loss_in_flight)
        menus, together = menu.all(seconds)
        blocks = {
            block.name: BlockCost(menus[block.name], weight_bytes(graph, block, self.memory))
            for block in graph.blocks
        }
        return GraphCosts(blocks, "analytic", device_speeds(machine), together, frees_in_order=True)


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


@dataclass(frozen=True)
class MeasuredTimes:
    """Seconds of one microbatch of a block, lower quartile of several runs.

    Attributes:
        forward_s: Forward pass.
        backward_s: Backward pass, without recomputation.
    """

    forward_s: float
    backward_s: float


@dataclass(frozen=True)
class ProfiledCostModel:
    """Prices blocks from measurements.

    Attributes:
        times: Measured seconds by block name.
        memory: What a trainable parameter costs in bytes besides its weight.
        factors: More numbers of slices to offer, by block. What slicing adds is not measured but
            computed from the machine's peaks (``menus.py``).
        unfused: Projections that are in another stage than the loss.
        loss_in_flight: Microbatches in flight in the last stage; ``None`` when not known.
    """

    times: Mapping[str, MeasuredTimes]
    memory: OptimizerMemory = field(default_factory=OptimizerMemory)
    factors: Mapping[str, Sequence[int]] = field(default_factory=dict, hash=False)
    unfused: tuple[str, ...] = ()
    loss_in_flight: int | None = None

    def estimate(self, graph: BlockGraph, machine: Machine) -> GraphCosts:
        """Return the price of every block of ``graph``.

        Raises:
            ValueError: A block was not measured.
        """
        missing = [block.name for block in graph.blocks if block.name not in self.times]
        if missing:
            raise ValueError(
                f"no measurement for {', '.join(missing)}; profile the model again on this machine"
            )
        seconds = {name: (time.forward_s, time.backward_s) for name, time in self.times.items()}
        graph = as_run_on(graph, machine.devices[0])
        roofline = Roofline(machine.devices[0])
        menu = BlockOptions(graph, roofline, self.factors, self.unfused, self.loss_in_flight)
        menus, together = menu.all(seconds)
        blocks = {
            block.name: BlockCost(menus[block.name], weight_bytes(graph, block, self.memory))
            for block in graph.blocks
        }
        return GraphCosts(blocks, "profiled", device_speeds(machine), together, frees_in_order=True)
