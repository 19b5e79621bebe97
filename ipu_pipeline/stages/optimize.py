"""The optimizer step that every target ends its backward passes with."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm


@dataclass(frozen=True)
class UpdateResult:
    """What an update did.

    Attributes:
        grad_norm: L2 norm over all unscaled gradients, before clipping.
        skipped: The gradients were not finite: no weight and no optimizer state was changed.
    """

    grad_norm: float
    skipped: bool


def apply_update(
    optimizer: torch.optim.Optimizer,
    parameters: Iterable[torch.nn.Parameter],
    *,
    loss_scaling: float = 1.0,
    max_grad_norm: float | None = None,
) -> UpdateResult:
    """Unscale, check, clip and apply the gradients, then clear them.

    Args:
        optimizer: Steps once, unless the gradients are not finite.
        parameters: Parameters of all stages; a tied one may come several times, it counts once.
        loss_scaling: The loss was multiplied by this; the gradients are divided by it.
        max_grad_norm: Upper bound of the norm over all gradients; ``None`` for no clipping.

    Returns:
        The norm before clipping, and whether the step was skipped.
    """
    with_grad = [p for p in dict.fromkeys(parameters) if p.grad is not None]
    gradients = [p.grad for p in with_grad if p.grad is not None]
    if loss_scaling != 1.0 and gradients:
        with torch.no_grad():
            torch._foreach_div_(gradients, loss_scaling)
    norm = get_total_norm(gradients)
    # One non-finite element makes the norm non-finite, so the norm is the whole check.
    skipped = not bool(torch.isfinite(norm))
    if not skipped:
        if max_grad_norm is not None:
            clip_grads_with_norm_(with_grad, max_grad_norm, norm)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for parameter in with_grad:
        parameter.grad = None
    return UpdateResult(grad_norm=float(norm), skipped=skipped)
