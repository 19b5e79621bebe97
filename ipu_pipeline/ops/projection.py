"""A linear layer computed in slices of its output channels, forward and backward.

Axes: M rows of the input (all its leading dimensions), H input features, V output features.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from ipu_pipeline.ops.autocast import autocast_dtype, no_autocast


def serialized_linear(
    x: Tensor, weight_VH: Tensor, bias_V: Tensor | None = None, *, factor: int
) -> Tensor:
    """Compute ``torch.nn.functional.linear`` in ``factor`` slices of its output channels.

    No slice copies or transposes the weight, and each gradient is written once, slice by slice.
    Where ``factor`` does not divide V, the last slice is shorter.

    Args:
        x: Input of any leading shape, last dimension H.
        weight_VH: Weight.
        bias_V: Bias, or None.
        factor: Number of slices, 1 to V.

    Returns:
        The product, last dimension V; under ``torch.autocast`` in the type ``linear`` would have.

    Raises:
        ValueError: The factor is below 1 or above V.

    Source:
        The mode ``OutputChannels`` of ``poptorch.serializedMatMul``.
    """
    rows = weight_VH.shape[0]
    if not 1 <= factor <= max(rows, 1):
        raise ValueError(
            f"factor {factor} cannot cut the {rows} output channels of a weight; "
            f"use 1 to {max(rows, 1)}"
        )
    x, weight_VH, bias_V = autocast_like_linear(x, weight_VH, bias_V)
    y_MV = _SerializedLinear.apply(x, weight_VH, bias_V, factor)
    return y_MV.view(*x.shape[:-1], rows)  # in the function it would refuse in-place writes


def autocast_like_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cast as ``torch.autocast`` does before a linear layer; outside of it change nothing."""
    dtype = autocast_dtype(x.device)
    if dtype is None:
        return x, weight, bias

    def cast(operand: Tensor) -> Tensor:
        return operand if operand.dtype is torch.float64 else operand.to(dtype)

    return cast(x), cast(weight), cast(bias) if bias is not None else None


def slices(size: int, factor: int) -> Iterator[slice]:
    """Cut ``range(size)`` into at most ``factor`` equal slices, the last one shorter."""
    step = max(1, -(-size // factor))
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))


class _SerializedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, factor: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.factor = factor
        x_MH = x.reshape(-1, x.shape[-1])
        y_MV = x.new_empty(x_MH.shape[0], weight.shape[0])
        with no_autocast():
            for cut in slices(weight.shape[0], factor):
                part = bias[cut] if bias is not None else None
                y_MV[:, cut] = functional.linear(x_MH, weight[cut], part)
        return y_MV

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        x_MH = x.reshape(-1, x.shape[-1])
        g_MV = grad.reshape(-1, weight.shape[0])
        dx = torch.zeros_like(x_MH) if need_x else None
        dw = torch.zeros_like(weight) if need_weight else None
        with no_autocast():
            for cut in slices(weight.shape[0], ctx.factor):
                if dx is not None:
                    dx.addmm_(g_MV[:, cut], weight[cut])
                if dw is not None:
                    dw[cut].addmm_(g_MV[:, cut].t(), x_MH)
            db = g_MV.sum(0) if need_bias else None
        return dx.view_as(x) if dx is not None else None, dw, db, None
