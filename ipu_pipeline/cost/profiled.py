"""The profiled cost model: measured seconds where a block ran on this machine.

Measuring needs torch and lives in ``profiling/blocks.py``; here measured numbers become prices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ipu_pipeline.cost.analytic import block_choices, device_speeds
from ipu_pipeline.cost.memory import OptimizerMemory, weight_bytes
from ipu_pipeline.cost.model import BlockCost, GraphCosts
from ipu_pipeline.ir.graph import BlockGraph
from ipu_pipeline.ir.machine import Machine


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
    """

    times: Mapping[str, MeasuredTimes]
    memory: OptimizerMemory = field(default_factory=OptimizerMemory)

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
        blocks = {}
        for block in graph.blocks:
            time = self.times[block.name]
            choices = block_choices(graph, block, time.forward_s, time.backward_s)
            blocks[block.name] = BlockCost(choices, weight_bytes(graph, block, self.memory))
        return GraphCosts(blocks, "profiled", device_speeds(machine))
