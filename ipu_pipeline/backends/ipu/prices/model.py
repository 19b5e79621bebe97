"""The IPU cost model: every block's seconds and bytes, and the pricing of whole pipelines."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ipu_pipeline.backends.ipu.prices.answer import DEFAULT_SETTINGS
from ipu_pipeline.backends.ipu.prices.calibration import DEFAULT_CALIBRATION, Calibration
from ipu_pipeline.backends.ipu.prices.chain import ChainPrices
from ipu_pipeline.backends.ipu.prices.chip import chip_of
from ipu_pipeline.backends.ipu.prices.memory import saved_bytes
from ipu_pipeline.backends.ipu.prices.planning import IPUPlanning, ProgramChoices
from ipu_pipeline.backends.ipu.prices.settings import IPUSettings
from ipu_pipeline.ir.graph import Block, BlockGraph
from ipu_pipeline.ir.machine import Machine
from ipu_pipeline.planner.options.block_cost import BlockChoice, BlockCost, GraphCosts

DEFAULT_CHOICES = ProgramChoices()


@dataclass(frozen=True)
class IPUCostModel:
    """Prices a graph on IPUs.

    Attributes:
        settings: Precision, memory proportions, optimizer, its place and sharding, front end.
            IPUs, replicas and microbatches are those of a pipeline, the mode is the graph's.
        choices: What the search may choose about the program.
        calibration: Constants of the time model.
    """

    settings: IPUSettings = DEFAULT_SETTINGS
    choices: ProgramChoices = DEFAULT_CHOICES
    calibration: Calibration = DEFAULT_CALIBRATION

    def estimate(self, graph: BlockGraph, machine: Machine) -> GraphCosts:
        """Return the price of every block of ``graph`` alone, and what prices pipelines of it.

        Raises:
            PlanError: The machine's devices are no IPUs.
        """
        settings = replace(self.settings, training=graph.training)
        chain = ChainPrices(graph, chip_of(machine), self.calibration)
        times = chain.times(replace(settings, accumulation=2), settings.proportion(0))
        blocks = {
            block.name: BlockCost(
                (
                    BlockChoice(
                        times.forward_s[i + 1] - times.forward_s[i],
                        times.backward_s[i + 1] - times.backward_s[i],
                        stash_bytes=saved_bytes(block, settings) if graph.training else 0,
                        workspace_bytes=chain.working(settings, settings.proportion(0), i, i + 1),
                    ),
                ),
                _weights(graph, block, settings),
            )
            for i, block in enumerate(graph.blocks)
        }
        planning = IPUPlanning(chain, settings, self.choices)
        return GraphCosts(blocks, "ipu", (1.0,) * len(machine.devices), planning=planning)


def _weights(graph: BlockGraph, block: Block, settings: IPUSettings) -> dict[str, int]:
    """Bytes by parameter: weight, accumulator, and optimizer state on the chip."""
    found = {}
    for fqn in block.parameters:
        parameter = graph.parameter_by_fqn[fqn]
        per_element: float = settings.element_bytes
        if parameter.trainable and settings.training:
            per_element += settings.element_bytes
            if not settings.optimizer_offchip:
                per_element += settings.state_bytes * settings.state_share
        found[fqn] = int(parameter.numel * per_element)
    return found
