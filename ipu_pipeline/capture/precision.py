"""A model in the dtype that its products run in, for prices: without its weights' values."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

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


def in_dtype(
    model: nn.Module, batch: Mapping[str, Any], name: str
) -> tuple[nn.Module, Mapping[str, Any]]:
    """Return a copy of a model on the meta device, and its batch, with floats of a dtype.

    Both as they are, if the model has values on a device (it runs in its own dtype), or weights of
    that dtype already.
    """
    dtype = getattr(torch, name)
    weights = [p for p in model.parameters() if p.is_floating_point()]
    if all(p.dtype == dtype for p in weights) or not all(p.is_meta for p in weights):
        return model, batch
    memo: dict[int, object] = {}
    for p in model.parameters():
        wanted = dtype if p.is_floating_point() else p.dtype
        empty = torch.empty_like(p, device="meta", dtype=wanted)
        memo[id(p)] = nn.Parameter(empty, requires_grad=p.requires_grad)
    floats = {
        key: value.to(dtype)
        for key, value in batch.items()
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.is_meta
    }
    return deepcopy(model, memo), {**batch, **floats}
