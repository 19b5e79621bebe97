"""Seconds of one block's forward and backward pass on one IPU, for one microbatch."""

from __future__ import annotations

from dataclasses import dataclass

from ipu_pipeline.backends.ipu.prices.calibration import DEFAULT_CALIBRATION, Calibration
from ipu_pipeline.backends.ipu.prices.chip import Chip
from ipu_pipeline.backends.ipu.prices.operations import Pricer
from ipu_pipeline.backends.ipu.prices.settings import IPUSettings
from ipu_pipeline.ir.attention import unfused
from ipu_pipeline.ir.graph import Block, BlockGraph
from ipu_pipeline.planner.options.tables import table_rows


@dataclass(frozen=True)
class BlockTime:
    """Seconds of one microbatch.

    Attributes:
        forward_s: Forward pass.
        backward_s: Backward pass without recomputation, gradient accumulation included.
    """

    forward_s: float
    backward_s: float


def pricer_for(
    chip: Chip, settings: IPUSettings, ipu: int, calibration: Calibration = DEFAULT_CALIBRATION
) -> Pricer:
    """Return what prices operations on ``ipu``."""
    return Pricer(chip, settings.precision, settings.proportion(ipu), calibration)


def block_time(
    graph: BlockGraph, block: Block, pricer: Pricer, settings: IPUSettings, factor: int = 1
) -> BlockTime:
    """Price ``block``.

    Args:
        graph: The model.
        block: One of its blocks.
        pricer: IPU, precision, memory proportion and constants.
        settings: Front end, accumulation and mode.
        factor: Slices of its large table, lookup or projection; 1 is whole.
    """
    rows = block_table_rows(graph, block) if factor > 1 else 0
    forward = sum(op.count * pricer.cycles(op, rows, factor) for op in unfused(block.forward_ops))
    backward = 0.0
    if settings.training:
        backward = sum(op.count * pricer.cycles(op, rows, factor) for op in unfused(block.backward_ops))
        backward += accumulation_cycles(graph, block, pricer, settings)
    seconds = 1.0 / pricer.chip.clock_hz
    if settings.front_end != "popart":
        seconds *= pricer.calibration.poptorch_factor
    return BlockTime(forward * seconds, backward * seconds)


def accumulation_cycles(
    graph: BlockGraph, block: Block, pricer: Pricer, settings: IPUSettings
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
    wanted = settings.embedding_factor if block.kind == "embedding" else settings.projection_factor
    if wanted == 1 or block.kind not in ("embedding", "head", "other"):
        return 1
    return wanted if block_table_rows(graph, block) else 1
