"""Activations in host memory: what a block keeps for its backward pass waits there.

As ``torch.autograd.graph.save_on_cpu``, which would take the weights along that a block saves, too:
they stay where they are.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from ipu_pipeline.capture.programs import Program
from ipu_pipeline.capture.state import key_of


def offloaded(program: Program) -> AbstractContextManager[Any]:
    """Within it, autograd saves what ``program`` computes in pinned host memory.

    Copies go over the stream that computes, so that nothing is read before it is there. A block
    that is recomputed saves its inputs only, and they go, too.
    """
    module = program.module
    weights = {key_of(tensor) for tensor in (*module.parameters(), *module.buffers())}

    def pack(tensor: Tensor) -> Tensor | tuple[torch.device, Tensor]:
        if _is_on_host(tensor) or key_of(tensor) in weights:
            return tensor
        kept = torch.empty(
            tensor.shape, dtype=tensor.dtype, pin_memory=torch.cuda.is_available()
        )  # fmt: skip
        return tensor.device, kept.copy_(tensor, non_blocking=True)

    def unpack(packed: Tensor | tuple[torch.device, Tensor]) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        device, kept = packed
        return kept.to(device, non_blocking=True)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def _is_on_host(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" or tensor.layout is not torch.strided
