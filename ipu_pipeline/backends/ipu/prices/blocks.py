"""Seconds of one block's forward and backward pass on one IPU, for one microbatch."""

from __future__ import annotations

from functools import lru_cache

from ipu_pipeline.backends.ipu.prices.chip import DEFAULT_CALIBRATION, Calibration, Chip
from ipu_pipeline.backends.ipu.prices.operations import OperationPricer
from ipu_pipeline.backends.ipu.prices.settings import IPUSettings
from ipu_pipeline.ir.attention import unfused
from ipu_pipeline.ir.graph import Block, BlockGraph, OpRecord
from ipu_pipeline.planner.options.tables import table_rows


def pricer_for(
    chip: Chip, settings: IPUSettings, ipu: int, calibration: Calibration = DEFAULT_CALIBRATION
) -> OperationPricer:
    """Return what prices operations on ``ipu``."""
    return OperationPricer(chip, settings.precision, settings.proportion(ipu), calibration)


class SharedOperations:
    """A tuple of operations compared by identity: equal layers share theirs, long to compare."""

    def __init__(self, operations: tuple[OpRecord, ...]) -> None:
        """Wrap ``operations``, which stay alive as long as the key."""
        self.operations = operations

    def __eq__(self, other: object) -> bool:
        """Whether both are the same object."""
        return isinstance(other, SharedOperations) and self.operations is other.operations

    def __hash__(self) -> int:
        """Hash of the object's address."""
        return id(self.operations)


def block_time(
    graph: BlockGraph, block: Block, pricer: OperationPricer, settings: IPUSettings
) -> tuple[float, float]:
    """Return seconds of a block's forward and backward pass for one microbatch.

    The backward pass has the gradient accumulation, and no recomputation.
    """
    factor = serialization_factor(graph, block, settings)
    rows = block_table_rows(graph, block) if factor > 1 else 0
    seconds = 1.0 / pricer.chip.clock_hz
    if settings.front_end != "popart":
        seconds *= pricer.calibration.poptorch_factor
    forward = _cycles(SharedOperations(block.forward_ops), pricer, rows, factor)
    if not settings.training:
        return forward * seconds, 0.0
    backward = _cycles(SharedOperations(block.backward_ops), pricer, rows, factor)
    backward += accumulation_cycles(graph, block, pricer, settings)
    return forward * seconds, backward * seconds


@lru_cache(maxsize=50_000)
def _cycles(operations: SharedOperations, pricer: OperationPricer, rows: int, factor: int) -> float:
    return sum(op.count * pricer.cycles(op, rows, factor) for op in unfused(operations.operations))


def accumulation_cycles(
    graph: BlockGraph, block: Block, pricer: OperationPricer, settings: IPUSettings
) -> float:
    """Cycles of adding one microbatch's weight gradients to the accumulators.

    Gradients are read, accumulators read and written. Lookups add their few rows in place.
    """
    if settings.accumulation == 1 or block.kind == "embedding":
        return 0.0
    found = [graph.parameter_by_fqn[name] for name in block.parameters]
    elements = sum(parameter.numel for parameter in found if parameter.trainable)
    if not elements:
        return 0.0
    return pricer.vector_cycles(3 * elements * pricer.element_bytes)


def block_table_rows(graph: BlockGraph, block: Block) -> int:
    """Rows of the block's large table (word embedding or output projection); 0 for none."""
    return table_rows([graph.parameter_by_fqn[name].shape for name in block.parameters])


def serialization_factor(graph: BlockGraph, block: Block, settings: IPUSettings) -> int:
    """Slices in which ``block`` runs under ``settings``; 1 where it has no large table."""
    if settings.block_slices is not None:
        return dict(settings.block_slices).get(block.name, 1)
    wanted = settings.embedding_factor if block.kind == "embedding" else settings.projection_factor
    if wanted == 1 or not may_serialize(graph, block):
        return 1
    return wanted


def may_serialize(graph: BlockGraph, block: Block) -> bool:
    """Whether ``block`` has a large table; a layer's feed-forward matrix is tall, but none."""
    return block.kind in ("embedding", "head", "other") and block_table_rows(graph, block) > 0
