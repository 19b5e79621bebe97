"""Gradients over ranks: tied copies, replicas, the norm over all stages, and the update."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from ipu_pipeline.backends.cluster.groups import Groups, exchange
from ipu_pipeline.backends.cluster.sharding import Ownership, share_updated, sum_to_updaters
from ipu_pipeline.stages.executable import ExecutionOptions
from ipu_pipeline.stages.training import UpdateResult, apply_update


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
def sum_over_ranks(
    model: nn.Module, ownership: Ownership, groups: Groups, *, for_update: bool
) -> None:
    """Sum gradients over the holders of tied parameters, and over the replicas.

    Every rank calls this. What has no gradient on any rank keeps none. Losses are weighted by
    their share of the whole batch, so sums are all that is needed. Parameters of one position
    come first: replicas of a late stage sum them while earlier stages still run.

    Args:
        model: Its gradients are this rank's own.
        ownership: Who holds what.
        groups: The processes.
        for_update: The sums are needed only where a parameter is updated.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    to_updaters = for_update and bool(ownership.updaters)
    alone = [p for p in parameters if ownership.is_held(p) and not ownership.shared(p)]
    if groups.layout.num_replicas > 1:
        alone = _present(alone, groups, groups.replicas)
        if to_updaters:
            sum_to_updaters(alone, ownership, groups)
        else:
            exchange([_gradient(p) for p in alone], groups.sum_over_replicas)
    for positions in sorted({ownership.shared(p) for p in parameters} - {()}):
        if ownership.here.position in positions:
            tied = [p for p in parameters if ownership.shared(p) == positions]
            _sum_tied(tied, positions, ownership, groups, to_updaters=to_updaters)


def _sum_tied(
    tied: Sequence[nn.Parameter],
    positions: tuple[int, ...],
    ownership: Ownership,
    groups: Groups,
    *,
    to_updaters: bool,
) -> None:
    holders = groups.holders(positions)
    found = _present(tied, groups, holders)
    if groups.layout.num_replicas > 1:
        found = _present(tied, groups, groups.replicas)
    for parameter in found:
        parameter.grad = groups.sum_in_order(_gradient(parameter), holders)
    if to_updaters:
        sum_to_updaters(found, ownership, groups)
    elif groups.layout.num_replicas > 1:
        for parameter in found:  # one by one: every holder then adds in the same order
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
        optimizer: Over the parameters that this process updates.
        parameters: Those that it holds, each once.
        ownership: Every parameter counts once in the norm, and is updated by its updaters.
        groups: The processes.
        options: Loss scaling and clipping.
    """
    with_grad = [p for p in parameters if p.grad is not None]
    updated = [p for p in with_grad if ownership.is_updated(p)]
    counted = [_gradient(p) for p in updated if ownership.is_chief(p)]

    def total_norm(_: object) -> Tensor:
        square = float(get_total_norm(counted)) ** 2 if counted else 0.0
        # The same bits on every rank, so that all of them skip or none does.
        return torch.tensor(groups.sum_numbers(square)).sqrt()

    done = apply_update(
        optimizer,
        updated,
        loss_scaling=options.loss_scaling,
        max_grad_norm=options.max_grad_norm,
        total_norm=total_norm,
    )
    if ownership.updaters and not done.skipped:
        share_updated(with_grad, ownership, groups)
    for parameter in with_grad:
        parameter.grad = None
    return done


def _present(
    parameters: Sequence[nn.Parameter], groups: Groups, group: dist.ProcessGroup
) -> list[nn.Parameter]:
    """Return those that have a gradient on any rank of the group; all have one afterwards."""
    if not parameters:
        return []
    flags = groups.any_true([p.grad is not None for p in parameters], group)
    found = [p for p, flag in zip(parameters, flags, strict=True) if flag]
    for parameter in found:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return found


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad
