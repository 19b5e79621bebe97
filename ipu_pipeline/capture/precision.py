"""A model in the dtype that its products run in, for prices: without its weights' values."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import nn

_HALVES = ("bfloat16", "float16")
# Products of layers in 8 or 4 bits stand between operations in 16.
_QUANTIZED = ("float8", "float4")


def dtype_for(model: nn.Module, precision: str | None) -> str:
    """Return the dtype to capture a model in for GPUs.

    That of ``precision``; of ``None``: that of the model's weights if they have 16 bits, else what
    its config says, else bfloat16, with the optimizer's copy of the weights in float32.
    """
    if precision:
        return "bfloat16" if precision in _QUANTIZED else precision
    own = {str(p.dtype).removeprefix("torch.") for p in model.parameters()}
    halves = [name for name in _HALVES if name in own]
    if halves:
        return halves[0]
    stated = getattr(getattr(model, "config", None), "dtype", None)
    return "bfloat16" if stated is None else str(stated).removeprefix("torch.")


def in_dtype(model: nn.Module, name: str) -> nn.Module:
    """Return a copy of ``model`` on the meta device with floating weights of a dtype.

    The model itself, if its weights are of that dtype. Its values are not copied.
    """
    dtype = getattr(torch, name)
    weights = [p for p in model.parameters() if p.is_floating_point()]
    if all(p.dtype == dtype for p in weights):
        return model
    memo: dict[int, object] = {}
    for p in model.parameters():
        wanted = dtype if p.is_floating_point() else p.dtype
        empty = torch.empty_like(p, device="meta", dtype=wanted)
        memo[id(p)] = nn.Parameter(empty, requires_grad=p.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach().to("meta")
    return deepcopy(model, memo)
