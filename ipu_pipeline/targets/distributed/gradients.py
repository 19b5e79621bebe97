"""Gradients over ranks: tied copies, replicas, the norm over all stages, and the update."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from ipu_pipeline.targets.base import ExecutionOptions
from ipu_pipeline.targets.distributed.groups import Groups
from ipu_pipeline.targets.distributed.ownership import Ownership
from ipu_pipeline.targets.optimize import UpdateResult


@contextmanager
def kept_aside(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Start without gradients; add those that were there when the block ends well.

    Sums over ranks must not count again what an earlier call has summed.
    """
    earlier = [(p, p.grad) for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    yield
    for parameter, gradient in earlier:
        if gradient is not None:
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


@torch.no_grad()
def sum_over_ranks(model: nn.Module, ownership: Ownership, groups: Groups) -> None:
    """Sum gradients over the holders of tied parameters, then over the replicas.

    Every rank calls this. What has no gradient on any rank keeps none. Losses are weighted by
    their share of the whole batch, so sums are all that is needed.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    present = groups.any_true([p.grad is not None for p in parameters])
    own = [
        p for p, found in zip(parameters, present, strict=True) if found and ownership.is_held(p)
    ]
    for parameter in own:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    tied = [p for p in own if ownership.shared(p)]
    for parameter in tied:
        group = groups.holders(ownership.shared(parameter))
        parameter.grad = groups.sum_in_order(_gradient(parameter), group)
    if groups.layout.num_replicas > 1:
        alone = [p for p in own if not ownership.shared(p)]
        _reduce_in_buckets(alone, groups)
        for parameter in tied:  # one by one: every holder then adds in the same order
            groups.sum_over_replicas(_gradient(parameter))


def update(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[nn.Parameter],
    ownership: Ownership,
    groups: Groups,
    options: ExecutionOptions,
) -> UpdateResult:
    """Unscale, check, clip and apply the gradients, then clear them; alike on all ranks.

    Args:
        optimizer: Over the parameters that this process holds.
        parameters: Those parameters, each once.
        ownership: A tied parameter counts once in the norm.
        groups: The norm is over this replica's pipeline; replicas have the same gradients.
        options: Loss scaling and clipping.
    """
    with_grad = [p for p in parameters if p.grad is not None]
    gradients = [_gradient(p) for p in with_grad]
    if options.loss_scaling != 1.0 and gradients:
        with torch.no_grad():
            torch._foreach_div_(gradients, options.loss_scaling)
    counted = [_gradient(p) for p in with_grad if ownership.owner(p) == groups.layout.position]
    square = float(get_total_norm(counted)) ** 2 if counted else 0.0
    # The same bits on every rank, so that all of them skip or none does.
    norm = torch.tensor(groups.sum_numbers(square, groups.pipeline)).sqrt()
    skipped = not bool(torch.isfinite(norm))
    if not skipped:
        if options.max_grad_norm is not None:
            clip_grads_with_norm_(with_grad, options.max_grad_norm, norm)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for parameter in with_grad:
        parameter.grad = None
    return UpdateResult(grad_norm=float(norm), skipped=skipped)


def _reduce_in_buckets(parameters: Sequence[nn.Parameter], groups: Groups) -> None:
    """Sum gradients over the replicas, all of one type in one message."""
    for dtype in sorted({p.dtype for p in parameters}, key=str):
        gradients = [_gradient(p) for p in parameters if p.dtype == dtype]
        bucket = torch.cat([gradient.reshape(-1) for gradient in gradients])
        groups.sum_over_replicas(bucket)
        parts = bucket.split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad
