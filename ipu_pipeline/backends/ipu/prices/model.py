"""The IPU cost model for the solver: every block's ways to run, in seconds and bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ipu_pipeline.backends.ipu.prices.blocks import BlockTime, block_table_rows, block_time
from ipu_pipeline.backends.ipu.prices.calibration import DEFAULT_CALIBRATION, Calibration
from ipu_pipeline.backends.ipu.prices.chip import chip_of
from ipu_pipeline.backends.ipu.prices.memory import FULLEST_TILE, saved_bytes, working_bytes
from ipu_pipeline.backends.ipu.prices.operations import Pricer
from ipu_pipeline.backends.ipu.prices.settings import IPUSettings
from ipu_pipeline.backends.ipu.prices.timing import float_bytes
from ipu_pipeline.ir.graph import Block, BlockGraph
from ipu_pipeline.ir.machine import Machine
from ipu_pipeline.planner.options.block_cost import BlockChoice, BlockCost, GraphCosts

# PopTorch runs every training program of more than one IPU with accumulation; how much does not
# change a block's price.
_TYPICAL = IPUSettings(num_ipus=1, accumulation=2, proportions=(0.2,), sharded=True)


@dataclass(frozen=True)
class IPUCostModel:
    """Prices blocks on an IPU (satisfies ``CostModel``).

    Bytes are scaled to the fullest tile, so that a stage fits when its sum does.

    Attributes:
        settings: Precision, memory proportion (the middle one of several), optimizer, its place
            and sharding, replicas, front end. Mode is the graph's.
        factors: Slices offered for blocks with a large table: lookups and output projections.
        calibration: Constants of the time model.
    """

    settings: IPUSettings = _TYPICAL
    factors: tuple[int, ...] = (1, 2, 4, 8)
    calibration: Calibration = DEFAULT_CALIBRATION

    def estimate(self, graph: BlockGraph, machine: Machine) -> GraphCosts:
        """Return the price of every block of ``graph``.

        Raises:
            PlanError: The machine's devices are no IPUs.
        """
        settings = replace(self.settings, training=graph.training)
        given = sorted(settings.proportions)
        proportion = given[len(given) // 2] if given else settings.proportion(0)
        pricer = Pricer(chip_of(machine), settings.precision, proportion, self.calibration)
        known: dict[object, tuple[BlockTime, int]] = {}
        blocks = {
            block.name: BlockCost(
                self._choices(graph, block, settings, pricer, known),
                self._weights(graph, block, settings),
            )
            for block in graph.blocks
        }
        return GraphCosts(blocks, "ipu", (1.0,) * len(machine.devices))

    def _choices(
        self,
        graph: BlockGraph,
        block: Block,
        settings: IPUSettings,
        pricer: Pricer,
        known: dict[object, tuple[BlockTime, int]],
    ) -> tuple[BlockChoice, ...]:
        # A layer's feed-forward matrix is tall, too, but only tables are computed in slices.
        rows = 0 if block.kind == "layer" else block_table_rows(graph, block)
        factors = self.factors if rows else (1,)
        saved = saved_bytes(block, settings) if settings.training else 0
        tensors = [graph.tensor_by_name[name] for name in block.inputs]
        entering = int(sum(float_bytes(tensor, settings.stashed_bytes) for tensor in tensors))
        shapes = tuple(graph.parameter_by_fqn[fqn].shape for fqn in block.parameters)
        plain, again = [], []
        for factor in factors:
            key = (block.forward_ops, block.backward_ops, block.kind, shapes, factor)
            if key not in known:
                time = block_time(graph, block, pricer, settings, factor)
                known[key] = (time, working_bytes(block, rows, factor, pricer, settings))
            time, working = known[key]
            plain.append(
                BlockChoice(
                    forward_s=time.forward_s,
                    backward_s=time.backward_s,
                    stash_bytes=_fullest(saved),
                    workspace_bytes=_fullest(working),
                    serialize_factor=factor,
                )
            )
            again.append(
                BlockChoice(
                    forward_s=time.forward_s,
                    backward_s=time.backward_s + time.forward_s,
                    stash_bytes=_fullest(entering),
                    workspace_bytes=_fullest(working + saved),
                    recompute=True,
                    serialize_factor=factor,
                )
            )
        return tuple(plain + again) if entering < saved else tuple(plain)

    def _weights(self, graph: BlockGraph, block: Block, settings: IPUSettings) -> Mapping[str, int]:
        """Bytes by parameter: weight, accumulator, and optimizer state on the chip."""
        found = {}
        for fqn in block.parameters:
            parameter = graph.parameter_by_fqn[fqn]
            per_element: float = settings.element_bytes
            if parameter.trainable and settings.training:
                per_element += settings.element_bytes
                if not settings.optimizer_offchip:
                    per_element += settings.state_bytes * settings.state_share
            found[fqn] = _fullest(parameter.numel * per_element)
        return found


def _fullest(num_bytes: float) -> int:
    return int(num_bytes * FULLEST_TILE)
