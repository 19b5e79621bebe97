"""What weights cost in memory while training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ipu_pipeline.ir.graph import Block, BlockGraph


@dataclass(frozen=True)
class OptimizerMemory:
    """Bytes that a trainable parameter costs besides its weight.

    Attributes:
        gradient_bytes: Bytes per element of the accumulated gradient; ``None``: as the weight.
        state_bytes: Bytes per element of optimizer state (AdamW in float32: 8).
    """

    gradient_bytes: float | None = None
    state_bytes: float = 8.0


def weight_bytes(graph: BlockGraph, block: Block, memory: OptimizerMemory) -> Mapping[str, int]:
    """Return bytes of weight, gradient and optimizer state by parameter, for one block."""
    result = {}
    for fqn in block.parameters:
        parameter = graph.parameter_by_fqn[fqn]
        total = float(parameter.num_bytes)
        if parameter.trainable and graph.training:
            own = parameter.num_bytes / max(parameter.numel, 1)
            per_element = memory.gradient_bytes if memory.gradient_bytes is not None else own
            total += parameter.numel * (per_element + memory.state_bytes)
        result[fqn] = int(total)
    return result


def gradient_bytes(graph: BlockGraph, block: Block) -> int:
    """Return the bytes of the gradients that one microbatch of ``block`` adds to those before."""
    if not graph.training:
        return 0
    parameters = (graph.parameter_by_fqn[fqn] for fqn in block.parameters)
    return sum(parameter.num_bytes for parameter in parameters if parameter.trainable)
