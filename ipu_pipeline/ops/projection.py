"""A linear layer computed in slices, one after the other, forward and backward.

Axes: M rows of the input (all its leading dimensions), H input features, V output features.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

Mode = Literal["output_channels", "reducing_dim", "input_channels"]


def serialized_linear(
    x: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None = None,
    *,
    factor: int,
    mode: Mode = "output_channels",
) -> Tensor:
    """Compute ``torch.nn.functional.linear`` in ``factor`` slices of one dimension.

    No slice copies or transposes the weight, and each gradient is written once, slice by slice.
    Where ``factor`` does not divide the dimension, the last slice is shorter.

    Args:
        x: Input of any leading shape, last dimension H.
        weight_VH: Weight.
        bias_V: Bias, or None.
        factor: Number of slices, at least 1.
        mode: Which dimension is cut: ``"output_channels"`` V, ``"reducing_dim"`` H, and
            ``"input_channels"`` M; where M is below ``factor`` each row is a slice.

    Returns:
        The product, last dimension V; under ``torch.autocast`` in the type ``linear`` would have.

    Raises:
        ValueError: The mode is unknown, or the factor is below 1 or above the dimension it cuts.

    Source:
        The three modes of ``poptorch.serializedMatMul``.
    """
    if mode not in get_args(Mode):
        raise ValueError(f"mode {mode!r} is unknown; use one of {', '.join(get_args(Mode))}")
    rows, columns = weight_VH.shape
    limit = {"output_channels": rows, "reducing_dim": columns}.get(mode, factor)
    if not 1 <= factor <= max(limit, 1):
        raise ValueError(
            f"factor {factor} cannot cut {mode} of a {rows} x {columns} weight; "
            f"use 1 to {max(limit, 1)}"
        )
    x, weight_VH, bias_V = autocast_like_linear(x, weight_VH, bias_V)
    y_MV = _SerializedLinear.apply(x, weight_VH, bias_V, factor, mode)
    return y_MV.view(*x.shape[:-1], rows)  # in the function it would refuse in-place writes


def autocast_like_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cast as ``torch.autocast`` does before a linear layer; outside of it change nothing."""
    if not torch.is_autocast_enabled("cpu"):
        return x, weight, bias
    dtype = torch.get_autocast_dtype("cpu")

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
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, factor: int, mode: Mode
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.factor, ctx.mode = factor, mode
        x_MH = x.reshape(-1, x.shape[-1])
        y_MV = x.new_empty(x_MH.shape[0], weight.shape[0])
        with torch.autocast("cpu", enabled=False):
            if mode == "reducing_dim":
                y_MV.copy_(bias) if bias is not None else y_MV.zero_()
                for cut in slices(weight.shape[1], factor):
                    y_MV.addmm_(x_MH[:, cut], weight[:, cut].t())
            elif mode == "output_channels":
                for cut in slices(weight.shape[0], factor):
                    part = bias[cut] if bias is not None else None
                    y_MV[:, cut] = functional.linear(x_MH, weight[cut], part)
            else:
                for cut in slices(x_MH.shape[0], factor):
                    y_MV[cut] = functional.linear(x_MH[cut], weight, bias)
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
        sizes = {"output_channels": weight.shape[0], "reducing_dim": weight.shape[1]}
        everything = slice(None)
        with torch.autocast("cpu", enabled=False):
            for cut in slices(sizes.get(ctx.mode, x_MH.shape[0]), ctx.factor):
                m = cut if ctx.mode == "input_channels" else everything
                h = cut if ctx.mode == "reducing_dim" else everything
                v = cut if ctx.mode == "output_channels" else everything
                if dx is not None:
                    dx[m, h].addmm_(g_MV[m, v], weight[v, h])
                if dw is not None:
                    dw[v, h].addmm_(g_MV[m, v].t(), x_MH[m, h])
            db = g_MV.sum(0) if need_bias else None
        return dx.view_as(x) if dx is not None else None, dw, db, None, None
