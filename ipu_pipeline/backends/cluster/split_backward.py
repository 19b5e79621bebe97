"""Whether torch can compute a stage's gradients of inputs and of weights at different times.

Zero-bubble schedules do. Torch finds the weights' part by walking the autograd graph, which
fails or goes wrong for some graphs (T5's position bias is one input of many blocks), and misses
what is recomputed or serialized. So every stage is tried once before it is trusted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

from ipu_pipeline.backends.cluster.module import StageModule
from ipu_pipeline.capture.patches import preserved_state

TOLERANCE = 1e-4


def can_split_backward(module: StageModule, received: Sequence[Tensor]) -> bool:
    """Try one microbatch; gradients that parameters have (of full microbatches) are kept.

    Args:
        module: The stage; its inputs are set.
        received: Describe what it receives (no data).
    """
    stage = module.stage
    if stage.index == 0:
        return True  # receives nothing: torch computes it whole, later
    names = {program.name for program in stage.programs}
    if stage.tables or stage.row_shards or stage.recompute & names:
        return False
    parameters = [p for p in module.parameters() if p.requires_grad]
    earlier = [p.grad for p in parameters]
    try:
        with preserved_state(module):
            whole = _gradients(module, received, parameters, _whole)
            parts = _gradients(module, received, parameters, _in_two)
    except RuntimeError:
        return False
    finally:
        for parameter, gradient in zip(parameters, earlier, strict=True):
            parameter.grad = gradient
        module.clear()
    return all(_equal(a, b) for a, b in zip(whole, parts, strict=True))


Backward = Callable[[list[Tensor], list[Tensor], list[Tensor], list[Any]], None]


def _gradients(
    module: StageModule, received: Sequence[Tensor], parameters: list[Any], backward: Backward
) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    leaves = [_filled(described, generator) for described in received]
    position = torch.zeros(1, dtype=torch.int64)
    outputs = [value for value in module(*leaves, microbatch=position) if value.requires_grad]
    seeds = [torch.ones_like(value) for value in outputs]
    inputs = [leaf for leaf in leaves if leaf.requires_grad]
    for parameter in parameters:
        parameter.grad = None
    backward(outputs, seeds, inputs, parameters)
    return [None if p.grad is None else p.grad.clone() for p in (*inputs, *parameters)]


def _whole(outputs: list[Tensor], seeds: list[Tensor], _: list[Tensor], __: list[Any]) -> None:
    torch.autograd.backward(outputs, seeds)


def _in_two(
    outputs: list[Tensor], seeds: list[Tensor], inputs: list[Tensor], parameters: list[Any]
) -> None:
    found, groups = stage_backward_input(outputs, seeds, inputs, iter(parameters))
    for leaf, gradient in zip(inputs, found, strict=True):
        leaf.grad = gradient
    stage_backward_weight(iter(parameters), groups)


def _filled(described: Tensor, generator: torch.Generator) -> Tensor:
    if not described.is_floating_point():
        return torch.zeros(described.shape, dtype=described.dtype)
    values = torch.randn(described.shape, generator=generator).to(described.dtype)
    return values.requires_grad_(described.requires_grad)


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    scale = float(a.abs().max()) if a.numel() else 0.0
    return bool(torch.allclose(a, b, rtol=0, atol=TOLERANCE * scale))
