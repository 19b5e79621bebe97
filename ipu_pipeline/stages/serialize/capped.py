"""Cross entropy behind a projection and pointwise functions of its logits, such as a soft cap.

The fused operation knows no function between projection and softmax; here every slice of tokens
computes its logits, the functions and its losses, and computes them again in the backward pass.

Axes: N tokens, H hidden size, V classes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ipu_pipeline.ops.linear_cross_entropy import Reduction
from ipu_pipeline.ops.projection import slices

Pointwise = tuple[Callable[[Tensor], Tensor], ...]


def apply(pointwise: Pointwise, logits: Tensor) -> Tensor:
    """Apply the functions one after the other."""
    for function in pointwise:
        logits = function(logits)
    return logits


def capped_cross_entropy(
    operands: tuple[Tensor, Tensor, Tensor | None],
    pointwise: Pointwise,
    target_N: Tensor,
    *,
    class_weight_V: Tensor | None,
    reduction: Reduction,
    ignore_index: int,
    label_smoothing: float,
    num_slices: int,
) -> Tensor:
    """Compute ``cross_entropy(pointwise(linear(x, weight, bias)), ...)`` in slices of tokens.

    Args:
        operands: Input (N x H), weight and bias of the projection.
        pointwise: Functions that work on every logit alone.
        target_N: Class of every token.
        class_weight_V: As in ``functional.cross_entropy``, like all that follow.
        reduction: ``mean``, ``sum`` or ``none``.
        ignore_index: Tokens of this class count nowhere.
        label_smoothing: Share of the target spread over all classes.
        num_slices: About ``N / num_slices * V`` logits exist at once.
    """
    x_NH, weight_VH, bias_V = operands

    def losses_of(x: Tensor, target: Tensor) -> Tensor:
        logits = apply(pointwise, functional.linear(x, weight_VH, bias_V))
        return functional.cross_entropy(
            logits if logits.dtype == torch.float64 else logits.float(),
            target,
            class_weight_V,
            ignore_index=ignore_index,
            reduction="none",
            label_smoothing=label_smoothing,
        )

    parts: list[Tensor] = [
        checkpoint(
            losses_of, x_NH[cut], target_N[cut], use_reentrant=False, preserve_rng_state=False
        )
        for cut in slices(len(x_NH), num_slices)
    ]
    losses_N = torch.cat(parts) if parts else losses_of(x_NH, target_N)
    if reduction == "none":
        return losses_N
    if reduction == "sum":
        return losses_N.sum()
    counted = target_N[target_N != ignore_index]
    return losses_N.sum() / (
        len(counted) if class_weight_V is None else class_weight_V[counted].sum()
    )
